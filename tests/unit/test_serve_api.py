"""The HTTP interface of one ingress replica in this process: real routes, limits and decoders, a scripted detector."""

import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import given, settings
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from clipflow_ray.config import OPENAI_VIEW, ServeConfig, ServeLimits
from clipflow_ray.images import Pixels
from clipflow_ray.model.calibration import Rule, SourceRange
from clipflow_ray.model.finding import Numbers
from clipflow_ray.serve.detector import DetectorReplica
from clipflow_ray.serve.ingress import Ingress
from clipflow_ray.serve.messages import Description, Refused, Scored
from clipflow_ray.serve.schemas import ModelInfo, Threshold
from clipflow_ray.serve.tokens import new_token
from tests.conftest import encoded, photo

PHOTO = encoded(photo(1, (64, 64)), quality=60)
LIMITS = ServeConfig(
    decoders=1,
    max_images=3,
    limits=ServeLimits(max_bytes=4000),
    max_body_bytes=20_000,
    max_json_bytes=20_000,
    timeout_seconds=5.0,
)
UNSEEN = SourceRange(sources=40, median=0.01, mean=0.0125, low=0.0, high=0.0625)
MODEL = ModelInfo(model_id="m", calibration_id="c", tool_version="0")


class Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class ScriptedDetector:
    """A handle to detectors that give every image the score `value`; each of `errors` is raised by one call first.

    All strata in `prone` are prone to false alarms.
    """

    def __init__(
        self,
        errors: list[Exception] | None = None,
        delay: float = 0.0,
        value: float = 1.0,
        p_value: float = 0.5,
        prone: tuple[str, ...] = (),
    ) -> None:
        self.value, self.p_value, self.prone = value, p_value, prone
        self.errors = errors or []
        self.delay = delay
        self.view = OPENAI_VIEW
        self.sizes: list[int] = []  # values of the views that it was asked to score
        self.score, self.describe, self.reproduces = Method(self._score), Method(self._describe), Method(self._probe)

    def options(self, **_: object) -> "ScriptedDetector":
        return self

    async def _score(self, views: list[Pixels], alpha: float | None) -> Scored | Refused:
        self.sizes += [view.size for view in views]
        await asyncio.sleep(self.delay)
        if self.errors:
            raise self.errors.pop(0)
        if alpha is not None and alpha < 0.001:
            return Refused("too small for this calibration.")
        numbers = [Numbers(-9.0, self.value, self.p_value) for _ in views]
        rule = Rule(alpha or 0.01, frozenset(self.prone), cap=True)
        return Scored(MODEL, self.view, rule, (0.005, 0.02), UNSEEN, 0.001, numbers)

    async def _describe(self) -> Description:
        interval = (0.005, 0.02)
        thresholds = [Threshold(alpha=0.01, score=2.0, false_positive_rate_95=interval, unseen_source=UNSEEN)]
        words = ("p cannot be below 0.001.",)
        return Description(
            MODEL, self.view, 0.01, interval, UNSEEN, 0.001, 999, UNSEEN.sources, words, thresholds, "# Card"
        )

    async def _probe(self, view: object) -> bool:
        return not self.errors


class Service:
    """One ingress replica without Ray."""

    def __init__(self, config: ServeConfig, detector: ScriptedDetector) -> None:
        self.detector = detector
        self.ingress = Ingress(config, detector)  # type: ignore[arg-type]
        self.app = self.ingress.__serve_build_asgi_app__()

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return self.together([(method, path, kwargs)])[0]

    def detect(self, **kwargs: Any) -> httpx.Response:
        return self.request("POST", "/v1/detect", **kwargs)

    def together(self, requests: list[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
        async def send() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await asyncio.gather(*(client.request(m, p, **k) for m, p, k in requests))

        return asyncio.run(send())


@contextmanager
def served(config: ServeConfig = LIMITS, **script: Any) -> Iterator[Service]:
    service = Service(config, ScriptedDetector(**script))
    yield service
    service.ingress.service.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served() as made:
        yield made


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{at}.jpg", content)) for at, content in enumerate(contents)]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def images(*texts: str) -> dict[str, Any]:
    return {"images": [{"id": str(at), "b64": text} for at, text in enumerate(texts)]}


def test_results_come_in_request_order_and_a_bad_image_fails_alone(service: Service) -> None:
    answer = service.detect(files=files(b"text", PHOTO, b"")).json()
    assert [(r["id"], r["index"], r["status"]) for r in answer["results"]] == [
        ("0.jpg", 0, "error"),
        ("1.jpg", 1, "ok"),
        ("2.jpg", 2, "error"),
    ]
    assert [r["error"]["code"] for r in answer["results"] if "error" in r] == ["unsupported_format", "empty"]
    assert answer["results"][1]["sha256"] == hashlib.sha256(PHOTO).hexdigest()
    assert "error" not in answer["results"][1] and "score" not in answer["results"][0]
    assert answer["model"] == MODEL.model_dump() and "not proof" in answer["disclaimer"]


def test_an_item_holds_what_is_said_of_its_image(service: Service) -> None:
    good, bad = service.detect(files=files(PHOTO, b"text")).json()["results"]
    assert good.pop("latency_ms") > 0
    assert good == {
        "id": "0.jpg",
        "index": 0,
        "status": "ok",
        "sha256": hashlib.sha256(PHOTO).hexdigest(),
        "width": 64,
        "height": 64,
        "format": "JPEG",
        "score": 1.0,
        "log_likelihood": -9.0,
        "p_value": 0.5,
        "stratum": "jpeg|0-256",
        "verdict": "no_ai_signal",
        "reasons": ["above_alpha"],
        "warnings": ["no_exif", "enlarged_to_view"],
    }
    message = "This is no image that is known here; JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF and HEIC are decoded."
    assert bad == {
        "id": "1.jpg",
        "index": 1,
        "status": "error",
        "sha256": hashlib.sha256(b"text").hexdigest(),
        "error": {"code": "unsupported_format", "message": message},
    }


def test_an_item_of_a_prone_stratum_says_so_and_is_not_flagged() -> None:
    with served(p_value=0.001, prone=("jpeg|0-256",)) as service:
        (result,) = service.detect(files=files(PHOTO)).json()["results"]
    assert (result["verdict"], result["reasons"]) == ("inconclusive", ["below_alpha", "stratum_prone"])


def test_answers_say_what_alpha_means_for_a_source_never_seen_and_how_small_p_can_be(service: Service) -> None:
    found, model = service.detect(files=files(PHOTO)).json(), service.request("GET", "/v1/model").json()
    for answer in (found, model):
        assert answer["unseen_source"] == UNSEEN.model_dump() and answer["p_floor"] == 0.001
        assert answer["alpha_realised_95"] == [0.005, 0.02]
    assert model["thresholds"][0]["unseen_source"] == UNSEEN.model_dump()
    assert (model["calibration_n"], model["calibration_sources"]) == (999, 40)
    assert model["in_words"] == ["p cannot be below 0.001."]


def test_an_image_without_a_finite_score_is_an_error_of_its_own() -> None:
    with served(value=float("nan")) as service:
        answer = service.detect(files=files(PHOTO))
    (result,) = answer.json()["results"]
    assert (answer.status_code, result["status"], result["error"]["code"]) == (200, "error", "non_finite")
    assert "score" not in result and "verdict" not in result


def test_json_and_multipart_give_the_same_finding(service: Service) -> None:
    by_form = service.detect(files=files(PHOTO), data={"alpha": "0.02"}).json()
    by_json = service.detect(json=images(b64(PHOTO)) | {"alpha": 0.02}).json()
    assert by_form["alpha"] == by_json["alpha"] == 0.02
    varying = {"id": None, "latency_ms": None}
    assert by_form["results"][0] | varying == by_json["results"][0] | varying


def test_a_file_that_is_too_large_fails_alone_in_a_batch_and_the_request_when_it_is_the_only_one(
    service: Service,
) -> None:
    large = bytes(LIMITS.limits.max_bytes + 1)
    for body in ({"files": files(PHOTO, large)}, {"json": images(b64(PHOTO), b64(large))}):
        answer = service.detect(**body)
        assert answer.status_code == 200
        assert [r["status"] for r in answer.json()["results"]] == ["ok", "error"]
        assert answer.json()["results"][1]["error"]["code"] == "too_large_bytes"
    for body in ({"files": files(large)}, {"json": images(b64(large))}):
        answer = service.detect(**body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
UNENDED = b"--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\nabc"
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("kwargs", "status", "code"),
    [
        ({"files": files(*[PHOTO] * 4)}, 413, "batch_too_large"),
        ({"json": images(*["aaaa"] * 4)}, 413, "batch_too_large"),
        ({"files": files(bytes(30_000))}, 413, "batch_too_large"),
        ({"content": bytes(30_000), "headers": JSON}, 413, "batch_too_large"),
        ({"content": b"x"}, 415, "unsupported_media_type"),
        ({"content": b"x", "headers": {"Content-Type": "image/jpeg"}}, 415, "unsupported_media_type"),
        ({"content": b"{}", "headers": JSON | {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "invalid_request"),
        ({"content": b"x", "headers": FORM}, 400, "invalid_request"),
        ({"content": b"", "headers": FORM}, 400, "invalid_request"),
        ({"content": UNENDED, "headers": FORM}, 400, "invalid_request"),
        ({"content": b"--x\r\n\r\nabc\r\n--x--\r\n", "headers": FORM}, 422, "validation_error"),
        ({"content": b"--x--\r\n", "headers": FORM}, 422, "validation_error"),
        ({"files": [("file", ("a.jpg", PHOTO))]}, 422, "validation_error"),
        ({"files": [("files", (None, PHOTO))]}, 422, "validation_error"),
        ({"files": files(PHOTO), "data": {"alpha": "2"}}, 422, "validation_error"),
        ({"files": files(PHOTO), "data": {"alpha": "nan"}}, 422, "validation_error"),
        ({"files": files(PHOTO), "data": {"alpha": ["0.1", "0.1"]}}, 422, "validation_error"),
        ({"files": files(PHOTO), "data": {"alpha": "0" * 100}}, 422, "validation_error"),
        ({"files": files(PHOTO), "data": {"alpha": "0.0001"}}, 422, "validation_error"),
        ({"files": files(PHOTO), "data": {"url": "http://example.org/a.jpg"}}, 422, "validation_error"),
        ({"content": b"{", "headers": JSON}, 400, "invalid_request"),
        ({"content": b"\xff\xfe", "headers": JSON}, 400, "invalid_request"),
        ({"content": b"[" * 15_000, "headers": JSON}, 400, "invalid_request"),
        ({"content": b'{"images":' + b"9" * 5_000 + b"}", "headers": JSON}, 400, "invalid_request"),
        ({"content": b'{"images":[{"id":"\\ud800","b64":""}]}', "headers": JSON}, 400, "invalid_request"),
        ({"content": b'{"images":[{"id":"a","b64":"aaaa"}],"alpha":NaN}', "headers": JSON}, 422, "validation_error"),
        ({"json": {"images": []}}, 422, "validation_error"),
        ({"json": images("aaaa") | {"url": "http://example.org"}}, 422, "validation_error"),
        ({"json": images("aaaa") | {"alpha": 0}}, 422, "validation_error"),
        ({"json": images("aaaa") | {"alpha": 1e-9}}, 422, "validation_error"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_its_code(
    service: Service, kwargs: dict[str, Any], status: int, code: str
) -> None:
    answer = service.detect(**kwargs)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/page/../app.py", 404, "not_found"),
        ("GET", "/page/other.js", 404, "not_found"),
        ("GET", "/v1/detect", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("POST", "/v1/detect/", 404, "not_found"),
    ],
)
def test_a_wrong_path_or_method_gets_an_error_body(
    service: Service, method: str, path: str, status: int, code: str
) -> None:
    answer = service.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_file_name_is_only_ever_given_back(service: Service) -> None:
    name = 'x/../../etc/<script>"\n\x00'
    answer = service.detect(files=[("files", (name, PHOTO))])
    assert answer.status_code == 200
    assert "etc/<script>" in answer.json()["results"][0]["id"]
    long = service.detect(files=[("files", ("n" * 1000, PHOTO))])
    assert long.json()["results"][0]["id"] == "n" * 255


def test_a_call_to_a_detector_that_died_is_repeated_once_and_then_is_503() -> None:
    with served(errors=[ActorDiedError()]) as service:
        assert service.detect(files=files(PHOTO)).status_code == 200
    with served(errors=[ActorDiedError(), ActorDiedError()]) as service:
        answer = service.detect(files=files(PHOTO))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.headers["Retry-After"] == "2"


def test_a_full_queue_behind_the_ingress_is_429_with_retry_after() -> None:
    with served(errors=[BackPressureError(1, 1)]) as service:
        answer = service.detect(files=files(PHOTO))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert answer.headers["Retry-After"] == "2"


def test_a_detector_that_takes_too_long_is_504() -> None:
    with served(LIMITS.model_copy(update={"timeout_seconds": 0.3}), delay=5.0) as service:
        answer = service.detect(files=files(PHOTO))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_an_internal_error_discloses_nothing() -> None:
    with served(errors=[ZeroDivisionError("secret detail")]) as service:
        answer = service.detect(files=files(PHOTO))
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in answer.text and "Zero" not in answer.text
        assert service.detect(files=files(PHOTO)).status_code == 200


def test_above_its_limits_the_ingress_refuses_at_once_and_recovers() -> None:
    few = LIMITS.model_copy(update={"max_requests": 2, "max_items": 3, "max_images": 4})
    with served(few, delay=0.3) as service:
        answers = service.together([("POST", "/v1/detect", {"files": files(PHOTO)})] * 6)
        assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429, 429]
        assert all(a.headers["Retry-After"] == "2" for a in answers if a.status_code == 429)
        answers = service.together([("POST", "/v1/detect", {"files": files(PHOTO, PHOTO)})] * 2)
        assert sorted(a.status_code for a in answers) == [200, 429]
        assert service.detect(files=files(PHOTO, PHOTO, PHOTO)).status_code == 200


def test_a_full_ingress_refuses_before_it_reads() -> None:
    one = LIMITS.model_copy(update={"max_items": 1, "max_images": 1})
    read = 0

    async def content() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(8):
            read += 1
            yield bytes(1000)

    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "8000"}
    with served(one, delay=0.3) as service:
        answers = service.together(
            [
                ("POST", "/v1/detect", {"files": files(PHOTO)}),
                ("POST", "/v1/detect", {"content": content(), "headers": headers}),
            ]
        )
    assert ([a.status_code for a in answers], read) == ([200, 429], 0)


def test_images_are_decoded_again_if_the_checkpoint_has_changed_its_view(service: Service) -> None:
    with served() as other:
        assert other.detect(files=files(PHOTO)).status_code == 200
        other.detector.view = OPENAI_VIEW.model_copy(update={"sizes": (64,)})
        assert other.detect(files=files(PHOTO)).json()["results"][0]["status"] == "ok"
    assert other.detector.sizes == [OPENAI_VIEW.bytes, OPENAI_VIEW.bytes, 3 * 64 * 64]


def test_the_limits_of_the_settings_hold() -> None:
    with served(LIMITS.model_copy(update={"limits": ServeLimits(min_side=100)})) as service:
        answer = service.detect(files=files(PHOTO)).json()
    assert answer["results"][0]["error"]["code"] == "too_small"


def test_a_parameter_in_the_address_is_refused_and_not_ignored(service: Service) -> None:
    for method, path in (("POST", "/v1/detect?alpha=0.05"), ("GET", "/v1/model?x"), ("GET", "/metrics?name=a")):
        answer = service.request(method, path, **({"files": files(PHOTO)} if method == "POST" else {}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "validation_error")
        assert "alpha" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["a!b=", "data:image/png;base64,aaaa", "aa\naa", "\u00e9\u00e9\u00e9\u00e9", "aaa"])
def test_base64_that_is_malformed_is_an_error_of_its_own_image(service: Service, text: str) -> None:
    answer = service.detect(json=images(b64(PHOTO), text))
    assert answer.status_code == 200
    assert [result["status"] for result in answer.json()["results"]] == ["ok", "error"]
    assert answer.json()["results"][1]["error"] == {
        "code": "decode_failed",
        "message": "b64: this is not standard base64.",
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), (b"caf\xc3\xa9", False), (b"\xff", False)],
)
def test_a_request_id_is_kept_only_if_it_is_plain(service: Service, given: str | bytes, kept: bool) -> None:
    answer = service.detect(files=files(PHOTO), headers={"X-Request-Id": given})
    own = answer.json()["request_id"]
    assert answer.status_code == 200
    assert (own == given) if kept else (len(own) == 32 and own == answer.headers["X-Request-Id"])


def test_with_tokens_only_health_docs_model_and_page_need_none() -> None:
    token, digest = new_token()
    assert token not in digest and digest == hashlib.sha256(token.encode()).hexdigest()
    with served(LIMITS.model_copy(update={"tokens": (digest,)})) as service:
        for path in ("/", "/page/page.js", "/page/page.css", "/healthz", "/readyz", "/docs", "/openapi.json"):
            assert service.request("GET", path).status_code == 200, path
        assert service.request("GET", "/v1/model").json()["auth_required"] is True
        for wrong in ({}, {"Authorization": token}, {"Authorization": f"Bearer {token}x"}, {"Authorization": "Bearer"}):
            for method, path in (("POST", "/v1/detect"), ("GET", "/metrics"), ("GET", "/nothing")):
                answer = service.request(method, path, headers=wrong)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
                assert answer.headers["WWW-Authenticate"] == "Bearer" and token not in answer.text
        right = {"Authorization": f"Bearer {token}"}
        assert service.detect(files=files(PHOTO), headers=right).status_code == 200


def test_readyz_is_503_if_the_probe_image_is_not_reproduced() -> None:
    with served() as service:
        assert service.request("GET", "/readyz").status_code == 200
    with served(errors=[ValueError()]) as service:
        answer = service.request("GET", "/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert service.request("GET", "/healthz").status_code == 200


def test_the_log_has_one_line_per_request_without_names_tokens_or_paths_of_the_client(service: Service) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("clipflow_ray.serve")
    log.addHandler(handler)
    service.detect(files=[("files", ("CANARY.jpg", PHOTO))], headers={"Authorization": "Bearer CANARY"})
    service.request("GET", "/CANARY?CANARY=CANARY")
    log.removeHandler(handler)
    first, second = (json.loads(line) for line in lines)
    assert (first["path"], first["status"], first["items"]) == ("/v1/detect", 200, 1)
    assert (second["path"], second["status"], second["code"]) == ("", 404, "not_found")
    assert first["ms"] > 0 and len(first["request_id"]) == 32
    assert "CANARY" not in "".join(lines)


def test_page_and_docs_load_nothing_from_other_hosts(service: Service) -> None:
    for path in ("/", "/docs", "/page/page.js", "/page/page.css"):
        answer = service.request("GET", path)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert 'src="http' not in answer.text and 'href="http' not in answer.text and "url(http" not in answer.text
    assert "POST /v1/detect" in service.request("GET", "/docs").text
    card = service.request("GET", "/v1/model").json()
    assert card["card"] == "# Card" and card["limits"]["max_images"] == 3 and card["limits"]["formats"][0] == "JPEG"


def test_the_api_does_what_its_openapi_document_says(service: Service) -> None:
    described = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    paths = []
    for found in described.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        paths.append(operation.path)
        if operation.path == "/metrics":
            continue

        @settings(max_examples=60, deadline=None, database=None, derandomize=True)
        @given(operation.as_strategy())
        def check(case: schemathesis.Case[Any]) -> None:
            # A schema cannot say whether text is base64, or whether the calibration supports an alpha.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
    assert paths == ["/v1/detect", "/v1/model", "/healthz", "/readyz", "/metrics"]


def test_a_view_of_another_size_gets_no_score_and_does_not_break_the_detector() -> None:
    replica = object.__new__(DetectorReplica)
    replica._view = OPENAI_VIEW
    numbers = asyncio.run(replica._scored(np.zeros((384, 384, 3), np.uint8)))
    assert np.isnan([numbers.log_likelihood, numbers.score, numbers.p_value]).all()
