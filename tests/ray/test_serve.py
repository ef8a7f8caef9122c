"""The endpoint over HTTP: it gives the detector's own numbers, and updates and crashes fail no request."""

import io
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from PIL import Image
from ray import serve
from ray.serve.schema import ServeDeploySchema

from clipflow_ray import compat
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Calibrated, load_checkpoint, save_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import fingerprint
from clipflow_ray.model.weights import load_record
from clipflow_ray.serve.tokens import new_token
from tests.conftest import encoded, photo
from tests.ray.site import asking, replicas, until

ALPHA = 0.05
CANARY = "canary-5f0c"
TOKEN, DIGEST = new_token()


@dataclass
class Endpoint:
    url: str
    checkpoint: str

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)

    def deploy(self, checkpoint: str, detector: dict[str, Any] | None = None, precision: str = "auto") -> None:
        arguments = {
            "checkpoint": checkpoint,
            "precision": precision,
            "alpha": ALPHA,
            "tokens": [DIGEST],
            "ingress_cpus": 0.2,
            "detector_cpus": 0.2,
            "max_requests": 8,
            "max_queued_requests": 16,
            "health_check_seconds": 0.5,
            "decoders": 2,
        }
        application = {
            "name": "clipflow",
            "route_prefix": "/",
            "import_path": "clipflow_ray.serve.app:build_app",
            "args": arguments,
            "deployments": [{"name": "Detector", **detector}] if detector else [],
        }
        compat.serve_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def detect(self, client: httpx.Client, *contents: bytes) -> httpx.Response:
        return client.post("/v1/detect", files=[("files", (f"{at}", c)) for at, c in enumerate(contents)])


@pytest.fixture(scope="module")
def endpoint(trained: str) -> Iterator[Endpoint]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 40})
    made = Endpoint(f"http://127.0.0.1:{port}", trained)
    made.deploy(trained)
    with made.client() as client:
        until(lambda: client.get("/readyz").status_code == 200)
    yield made
    serve.shutdown()


@pytest.fixture(scope="module")
def other(trained: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that differs from the trained one, and is calibrated for bfloat16 as well."""
    checkpoint = load_checkpoint(trained)
    state = {
        name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in checkpoint.flow_state.items()
    }
    path = str(tmp_path_factory.mktemp("other") / "checkpoint")
    half = checkpoint.encoder.model_copy(update={"precision": "bfloat16"})
    own = checkpoint.calibration
    assert own is not None
    calibrated = Calibrated(
        fingerprint(half, load_record(half), checkpoint.view.sizes), Calibration.fit(own.scores + 0.01, own.strata)
    )
    save_checkpoint(replace(checkpoint, flow_state=state, further={"bfloat16": calibrated}), path)
    return path


def contents(naturals: Path) -> list[bytes]:
    """Files of all formats and several sizes, some of them broken."""
    jpegs = [path.read_bytes() for path in sorted(naturals.glob("*/*.jpg"))[::4]]
    made = [encoded(photo(900 + at, (60 + 40 * at, 300)), kind) for at, kind in enumerate(("PNG", "WEBP", "GIF"))]
    grey = io.BytesIO()
    Image.fromarray(photo(7)).convert("L").save(grey, "PNG")
    broken = [b"", b"text", jpegs[0][:900], made[0][:500], encoded(photo(8, (16, 16)), "PNG"), b"GIF89a" + bytes(40)]
    mixed: list[bytes] = []
    for at, data in enumerate([*jpegs, *made, grey.getvalue()]):
        mixed += [data, broken[at % len(broken)]] if at % 4 == 0 else [data]
    return mixed


def load(endpoint: Endpoint, data: Sequence[bytes]) -> AbstractContextManager[list[httpx.Response]]:
    return asking(endpoint.client, lambda client: endpoint.detect(client, *data))


def test_http_gives_the_detector_s_own_findings_in_request_order(endpoint: Endpoint, naturals: Path) -> None:
    data = contents(naturals)
    expected = Detector.from_checkpoint(endpoint.checkpoint).detect(data, ALPHA)
    with endpoint.client() as client:
        results = [
            r for at in range(0, len(data), 32) for r in endpoint.detect(client, *data[at : at + 32]).json()["results"]
        ]
    assert len(results) == len(data) > 32
    assert {"ok", "error"} == {result["status"] for result in results}
    for at, (finding, result) in enumerate(zip(expected, results, strict=True)):
        wanted = {key: value for key, value in asdict(finding).items() if value is not None}
        if finding.status == "error":
            assert (result["error"], result["sha256"]) == (wanted["error"], wanted["sha256"])
            continue
        for name in ("score", "log_likelihood"):
            assert result.pop(name) == pytest.approx(wanted.pop(name), rel=1e-4, abs=1e-4)
        latency = result.pop("latency_ms")
        assert latency > 0
        assert result == wanted | {"id": str(at % 32), "index": at % 32}


def test_a_score_does_not_depend_on_who_else_asks(endpoint: Endpoint, naturals: Path) -> None:
    data = [path.read_bytes() for path in sorted(naturals.glob("harbour/*.jpg"))]
    with endpoint.client() as client:
        alone = [endpoint.detect(client, one).json()["results"][0]["score"] for one in data]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda one: endpoint.detect(client, one).json()["results"][0]["score"], data))
    assert together == pytest.approx(alone, abs=1e-4)


def test_more_than_32_images_and_a_wrong_token_are_refused(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        answer = endpoint.detect(client, *[b"x"] * 33)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "batch_too_large")
        answer = client.post("/v1/detect", headers={"Authorization": "Bearer no"}, files=[("files", ("a", b"x"))])
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert client.post("/v1/detect", content=b"x").json()["error"]["code"] == "unsupported_media_type"


def test_an_alpha_beyond_the_calibration_is_refused_with_the_reason(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        answer = client.post("/v1/detect", files=[("files", ("a", b"x"))], data={"alpha": "0.0001"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "validation_error")
    assert "calibration images" in answer.json()["error"]["message"]


def test_the_request_id_is_in_one_header_and_the_same_in_the_body(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        for given in (None, "abc-123"):
            answer = client.get("/nothing", headers={"X-Request-Id": given} if given else {})
            ids = answer.headers.get_list("X-Request-Id")
            assert ids == [answer.json()["error"]["request_id"]]
            assert given in (None, ids[0])


def test_alpha_and_batching_change_without_a_restart(endpoint: Endpoint) -> None:
    before = replicas("Detector"), replicas("Ingress")
    changed = {"user_config": {"alpha": 0.2, "max_batch_size": 4, "batch_wait_seconds": 0.0}}
    with endpoint.client() as client, load(endpoint, [encoded(photo(3))] * 6) as answers:
        endpoint.deploy(endpoint.checkpoint, changed)
        until(lambda: client.get("/v1/model").json()["alpha"] == 0.2)
        until(lambda: bool(answers) and answers[-1].json()["alpha"] == 0.2)
    assert {answer.status_code for answer in answers} == {200}
    assert (replicas("Detector"), replicas("Ingress")) == before
    endpoint.deploy(endpoint.checkpoint)
    with endpoint.client() as client:
        until(lambda: client.get("/v1/model").json()["alpha"] == ALPHA)


def test_a_new_checkpoint_at_another_precision_is_served_without_a_failed_request(
    endpoint: Endpoint, other: str
) -> None:
    old, new = (load_checkpoint(path).model_id for path in (endpoint.checkpoint, other))
    first = replicas("Detector")
    with load(endpoint, [encoded(photo(3)), b"text"]) as answers:
        endpoint.deploy(other, precision="bfloat16")
        until(lambda: bool(answers) and answers[-1].json()["model"]["model_id"] == new)
        until(lambda: not first & replicas("Detector"))
        time.sleep(1.0)
    assert Counter(answer.status_code for answer in answers) == {200: len(answers)}
    assert {answer.json()["model"]["model_id"] for answer in answers} == {old, new}
    detector = Detector.from_checkpoint(other, precision="bfloat16")
    finding, (result, _), model = (
        detector.detect(encoded(photo(3)), ALPHA),
        answers[-1].json()["results"],
        answers[-1].json()["model"],
    )
    assert (model["precision"], model["calibration_id"]) == ("bfloat16", detector.calibration.calibration_id)
    assert result["score"] == pytest.approx(finding.score, rel=1e-4, abs=1e-4)
    assert (result["p_value"], result["verdict"]) == (finding.p_value, finding.verdict)
    endpoint.checkpoint = other


def gone(name: str) -> bool:
    return name not in replicas("Detector")


def test_a_detector_that_is_killed_under_load_gives_no_500(endpoint: Endpoint) -> None:
    with load(endpoint, [encoded(photo(4))]) as answers, endpoint.client() as client:
        for _ in range(2):
            until(lambda: len(replicas("Detector")) == 1 and client.get("/readyz").status_code == 200)
            (name,) = replicas("Detector")
            ray.kill(ray.get_actor(name, namespace="serve"))
            until(partial(gone, name))
        until(lambda: client.get("/readyz").status_code == 200)
        seen = len(answers)
        until(lambda: len(answers) > seen + 5)
    statuses = Counter(answer.status_code for answer in answers)
    # 504: on a busy machine a new replica can take longer to start than a request may.
    assert set(statuses) <= {200, 503, 504}, statuses
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 503)
    assert [answer.status_code for answer in answers[-3:]] == [200] * 3


def test_overload_is_429_with_retry_after_and_admitted_requests_succeed(endpoint: Endpoint) -> None:
    data = [encoded(photo(at)) for at in range(16)]
    with endpoint.client() as client, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: endpoint.detect(client, *data), range(40)))
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}, statuses
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 429)
        assert endpoint.detect(client, data[0]).status_code == 200


def test_the_metrics_count_requests_verdicts_errors_and_batches(endpoint: Endpoint) -> None:
    names = ("requests", "items", "errors", "batch_size", "queue_seconds", "decode_seconds", "inference_seconds")
    with endpoint.client() as client:
        until(lambda: all(f"clipflow_serve_{name}" in client.get("/metrics").text for name in names))
        text = client.get("/metrics").text
    assert 'code="unsupported_format"' in text and 'verdict="' in text and 'path="/v1/detect"' in text
    assert all(
        line.startswith(("ray_clipflow_serve_", "# HELP ray_clipflow", "# TYPE ray_clipflow"))
        for line in text.splitlines()
    )


def test_nothing_that_clients_send_is_logged_or_disclosed(endpoint: Endpoint) -> None:
    picture = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = CANARY
    Image.fromarray(photo(2)).save(picture, "JPEG", exif=exif)
    with endpoint.client() as client:
        uploads = [("files", (f"{CANARY}.jpg", picture.getvalue()))]
        assert client.post(f"/v1/detect?q={CANARY}", files=uploads).status_code == 422
        answer = client.post("/v1/detect", files=uploads)
        assert answer.json()["results"][0]["status"] == "ok"
        assert answer.text.count(CANARY) == 1  # the id of the item
        assert TOKEN not in answer.text and DIGEST not in answer.text
        request_id = answer.json()["request_id"]
        logs = (
            Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / ray.get_runtime_context().get_session_name() / "logs"
        )
        until(lambda: request_id in all_text(logs))
    everything = all_text(logs)
    assert CANARY not in everything and TOKEN not in everything


def all_text(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
