"""The client against a small HTTP server with scripted answers."""

import asyncio
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipflow_ray import client as module
from clipflow_ray.client import AsyncClient, Client
from clipflow_ray.errors import ClientError, ConfigError
from clipflow_ray.serve.schemas import DetectResponse
from tests.conftest import encoded, photo

TOKEN = "canary-token-81"


@dataclass
class Asked:
    path: str
    authorization: str | None
    files: list[tuple[str, bytes]]
    alpha: str | None
    size: int
    at: float


@dataclass
class Endpoint:
    """`planned` answers (status, headers, body) come first; after them every image gets an ok result."""

    url: str = ""
    planned: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)


def refusal(code: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": "Do this next.", "request_id": "r-1", "new": 1}}).encode()


def found(names: Sequence[str]) -> bytes:
    results = [{"id": n, "index": at, "status": "ok", "score": 1.5, "new": True} for at, n in enumerate(names)]
    model = {"model_id": "m", "calibration_id": "c", "tool_version": "1"}
    common = {"request_id": "r-2", "model": model, "alpha": 0.01, "alpha_realised_95": [0.008, 0.012]}
    return json.dumps({**common, "results": results, "disclaimer": "No proof.", "a_later_field": {}}).encode()


def parts(content_type: str, body: bytes) -> dict[str, list[tuple[str | None, bytes]]]:
    message = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    known: dict[str, list[tuple[str | None, bytes]]] = {}
    for part in message.walk():
        if not part.is_multipart():
            name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
            assert isinstance(name, str) and isinstance(content, bytes)
            known.setdefault(name, []).append((part.get_filename(), content))
    return known


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            form = parts(self.headers["Content-Type"], body) if body else {}
            files = [(str(name), data) for name, data in form.get("files", [])]
            alpha = form["alpha"][0][1].decode() if "alpha" in form else None
            authorization = self.headers.get("Authorization")
            state.asked.append(Asked(self.path, authorization, files, alpha, len(body), time.monotonic()))
            answer: tuple[int, dict[str, str], bytes] = (200, {}, found([name for name, _ in files]))
            status, headers, content = state.planned.pop(0) if state.planned else answer
            if status == 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    server.server_close()


Detect = Callable[..., DetectResponse]


@pytest.fixture(params=["sync", "async"])
def detect(request: pytest.FixtureRequest, endpoint: Endpoint) -> Detect:
    """`detect` of either client, with a token."""

    def synchronous(images: Any, alpha: float | None = None) -> DetectResponse:
        with Client(endpoint.url, TOKEN) as client:
            return client.detect(images, alpha)

    async def awaited(images: Any, alpha: float | None = None) -> DetectResponse:
        async with AsyncClient(endpoint.url, TOKEN) as client:
            return await client.detect(images, alpha)

    return synchronous if request.param == "sync" else lambda *a: asyncio.run(awaited(*a))


def test_any_number_of_paths_and_bytes_gives_results_in_their_order(
    detect: Detect, endpoint: Endpoint, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"first")
    answer = detect([tmp_path / "a.jpg", *(b"%d" % n for n in range(1, 70))], 0.05)
    assert [r.index for r in answer.results] == list(range(70))
    assert [r.id for r in answer.results] == ["a.jpg", *(f"image-{n}" for n in range(1, 70))]
    assert [len(asked.files) for asked in endpoint.asked] == [32, 32, 6]
    assert {asked.alpha for asked in endpoint.asked} == {"0.05"}
    assert endpoint.asked[0].files[0] == ("a.jpg", b"first")


def test_no_request_exceeds_the_body_limit(detect: Detect, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 300_000)
    answer = detect([bytes(100_000)] * 5)
    assert [len(asked.files) for asked in endpoint.asked] == [2, 2, 1]
    assert max(asked.size for asked in endpoint.asked) <= 300_000
    assert len(answer.results) == 5


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_endpoint_is_asked_again_after_retry_after(detect: Detect, endpoint: Endpoint, status: int) -> None:
    endpoint.planned = [(status, {"Retry-After": "1"}, refusal("overloaded"))]
    assert detect([b"x"]).results[0].status == "ok"
    first, second = endpoint.asked
    assert second.at - first.at >= 1.0


def test_waiting_time_and_attempts_are_limited(
    detect: Detect, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT_SECONDS", 0.05)
    endpoint.planned = [(429, {"Retry-After": "86400"}, refusal("overloaded"))] * 9
    with pytest.raises(ClientError, match="Do this next") as caught:
        detect([b"x"])
    assert (caught.value.code, caught.value.request_id) == ("overloaded", "r-1")
    assert len(endpoint.asked) == 5


def test_a_dropped_connection_is_tried_again(detect: Detect, endpoint: Endpoint) -> None:
    endpoint.planned = [(0, {}, b"")]
    assert detect([b"x"]).results[0].status == "ok"
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "invalid_request"), (401, "unauthorized"), (422, "validation_error"), (500, "internal"), (504, "timeout")],
)
def test_other_errors_are_not_tried_again(detect: Detect, endpoint: Endpoint, status: int, code: str) -> None:
    endpoint.planned = [(status, {}, refusal(code))]
    with pytest.raises(ClientError) as caught:
        detect([b"x"])
    assert caught.value.code == code
    assert len(endpoint.asked) == 1


def test_a_file_too_large_to_send_alone_is_one_result_with_an_error(
    detect: Detect, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 10_000)
    endpoint.planned = [(413, {}, refusal("file_too_large"))]
    answer = detect([bytes(9_000), bytes(20_000), b"fine"])
    assert [r.error.code if r.error else r.status for r in answer.results] == ["too_large_bytes"] * 2 + ["ok"]
    assert [r.index for r in answer.results] == [0, 1, 2]
    endpoint.planned = [(413, {}, refusal("file_too_large"))]
    with pytest.raises(ClientError, match="Do this next"):
        detect([bytes(9_000)])


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[1]", b'{"error":"no"}', b"\xff", b"null"])
@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_that_is_not_the_endpoint_s_is_an_unexpected_answer(
    detect: Detect, endpoint: Endpoint, status: int, body: bytes
) -> None:
    endpoint.planned = [(status, {"X-Request-Id": "r-3"}, body)]
    with pytest.raises(ClientError, match="clipflow-ray endpoint") as caught:
        detect([b"x"])
    assert (caught.value.code, caught.value.request_id) == ("unexpected_answer", "r-3")


def test_an_endpoint_that_is_down_is_unreachable_and_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT_SECONDS", 0.01)
    with Client("http://127.0.0.1:1") as client:
        assert client.ready() is False
        with pytest.raises(ClientError) as caught:
            client.model()
    assert caught.value.code == "unreachable"


def test_the_token_is_sent_and_shown_nowhere(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CLIPFLOW_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    endpoint.planned = [(401, {}, refusal("unauthorized"))]
    with Client(endpoint.url) as client, pytest.raises(ClientError) as caught:
        client.detect([b"x"])
    assert endpoint.asked[0].authorization == f"Bearer {TOKEN}"
    assert TOKEN not in caplog.text + repr(client) + repr(vars(client)) + repr(caught.value) + str(caught.value)


def test_a_mistake_of_the_caller_is_a_config_error(endpoint: Endpoint, tmp_path: Path) -> None:
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "", "http://a:b:c"):
        with pytest.raises(ConfigError, match="http://127"):
            Client(url)
    with pytest.raises(ConfigError, match="token"):
        Client(endpoint.url, "a\nb")
    with Client(endpoint.url) as client:
        with pytest.raises(ConfigError, match="at least one"):
            client.detect([])
        with pytest.raises(ConfigError, match="Cannot read none"):
            client.detect([tmp_path / "none.jpg"])
        for wrong in (7, None, [b"x", 7], {"a": b"x"}, np.zeros((8, 8)), io.StringIO("x")):
            with pytest.raises(TypeError, match="A picture is bytes"):
                client.detect(wrong)  # type: ignore[arg-type]
    assert endpoint.asked == []


def test_each_kind_of_picture_is_sent_as_its_file_and_a_missing_one_is_a_result_of_its_own(
    detect: Detect, endpoint: Endpoint, tmp_path: Path
) -> None:
    rgb = photo(1, (40, 50))
    path = tmp_path / "a.png"
    path.write_bytes(encoded(rgb, "PNG"))
    data = path.read_bytes()
    given = [path, str(path), data, io.BytesIO(data), tmp_path / "gone.png", Image.open(io.BytesIO(data)), rgb]
    results = detect(given).results
    assert [result.id for result in results] == ["a.png"] * 2 + ["image-2", "image-3", "gone.png", "image-5", "image-6"]
    assert [result.error.code if result.error else "ok" for result in results] == ["ok"] * 4 + ["not_found"] + [
        "ok"
    ] * 2
    assert [result.index for result in results] == list(range(7))
    sent = [data for asked in endpoint.asked for _, data in asked.files]
    assert sent[:4] == [data] * 4
    for each in sent:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(each))), rgb)
    assert detect(path).results[0].id == "a.png"
