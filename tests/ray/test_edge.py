"""The edge with the real nginx, over raw sockets: requests that Serve's own proxy mishandles do not reach it."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from clipflow_ray.config import ServeConfig
from clipflow_ray.errors import EdgeError
from clipflow_ray.serve.edge import CONFIG, edge, nginx_path
from tests.conftest import encoded, photo
from tests.ray.site import Answer, Site, edge_before, free_port, received, whole_site

pytestmark = pytest.mark.skipif(nginx_path() is None, reason="no nginx: install Debian's `nginx` to test the edge")

HOST = b"Host: x\r\nConnection: close\r\n"
POST = b"POST /v1/detect HTTP/1.1\r\n" + HOST
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CANARY = "canary-e1d7"


@pytest.fixture(scope="module")
def site(trained: str) -> Iterator[Site]:
    with whole_site(trained) as site:
        yield site


@pytest.fixture(scope="module")
def picture() -> bytes:
    return encoded(photo(1))


def detected(site: Site, picture: bytes, source: str = "127.0.0.1") -> httpx.Response:
    transport = httpx.HTTPTransport(local_address=source)
    with httpx.Client(base_url=site.url, transport=transport, timeout=20) as client:
        return client.post("/v1/detect", files={"files": ("a.jpg", picture)})


def test_an_image_is_judged_and_the_service_s_own_errors_pass_unchanged(site: Site, picture: bytes) -> None:
    answer = detected(site, picture)
    assert answer.status_code == 200
    assert answer.json()["results"][0]["status"] == "ok"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    refused = site.raw(POST + b"Content-Type: text/plain\r\nContent-Length: 1\r\n\r\nx")
    assert (refused.status, refused.error["code"]) == (415, "unsupported_media_type")
    assert "multipart" in refused.error["message"]


def test_a_body_that_is_spilled_to_disk_arrives_whole(site: Site) -> None:
    answer = detected(site, encoded(photo(2, (1400, 1400)), "PNG"))
    assert answer.json()["results"][0]["width"] == 1400


@pytest.mark.parametrize(
    "header",
    [
        b"X-Request-Id: \xff\xfe",
        b"X-Request-Id: " + b"a" * 4000,
        b"X-Request-Timeout-Seconds: \xff",
        b"X-Request-Timeout-Seconds: 0.000001",
        b"X-Request-Timeout-Seconds: nan",
        b"X-Request-Disconnect-Disabled: ?1",
        b"serve_multiplexed_model_id: \xff",
        b"X-Session-Id: \xff",
        b"X-Serve-Router-Key: \xff",
        b"Traceparent: \xff",
    ],
)
def test_headers_that_ray_serve_reads_have_no_effect_and_the_request_id_is_new(site: Site, header: bytes) -> None:
    answer = site.raw(b"GET /healthz HTTP/1.1\r\n" + HOST + header + b"\r\n\r\n")
    assert answer.status == 200
    assert len(answer.headers["x-request-id"]) == 32
    assert set(answer.headers["x-request-id"]) <= set("0123456789abcdef")


MALFORMED = {
    "length and chunked": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
    "the same length twice": POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "a length with a sign": POST + b"Content-Length: +1\r\n\r\nx",
    "a list of lengths": POST + b"Content-Length: 1, 1\r\n\r\nx",
    "another encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two encodings": POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n",
    "a chunk of no size": POST + CHUNKED + b"\r\nxx\r\nabc\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": POST + CHUNKED + b"\r\nfffffffffffffffff\r\nabc",
    "a folded line": POST + b"X-A: b\r\n c\r\n\r\n",
    "a folded first line": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
    "a bare carriage return": b"GET / HTTP/1.1\r\nHost: x\rX-A: b\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 1\r\n\r\nx",
    "NUL in a header": POST + b"X-A: b\0c\r\n\r\n",
    "NUL in a path": b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n",
    "%00 in a path": b"GET /%00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "raw bytes in a path": b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "raw bytes in the host": b"GET / HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n" + HOST + b"Host: y\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a proxy's method": b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n",
    "another version": b"GET / HTTP/9.9\r\n" + HOST + b"\r\n",
    "no HTTP": b"\x16\x03\x01\x00\r\n\r\n",
    "headers of 40 kB": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"a" * 40_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_request_that_two_servers_could_read_differently_is_refused(site: Site, name: str) -> None:
    answer = site.raw(MALFORMED[name])
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


def test_a_bare_line_feed_smuggles_no_second_request(site: Site) -> None:
    """nginx reads it as the end of a line, as the standard allows, and forwards a request that it writes itself."""
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(hidden)
    answer = site.raw(b"GET /healthz HTTP/1.1\r\nX-A: b\nHost: x\r\nConnection: close\r\n" + length + hidden)
    assert answer.status in (200, 400)
    assert b"HTTP/1.1" not in answer.body


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n",
        POST + b"Content-Length: %d\r\n\r\n" % (64 * 2**20 + 1),
        POST + CHUNKED + b"\r\n%x\r\nabc" % (65 * 2**20),
    ],
    ids=["announced", "declared", "chunked"],
)
def test_a_body_above_the_limit_is_refused_before_it_is_read(site: Site, request_bytes: bytes) -> None:
    start = time.monotonic()
    answer = site.raw(request_bytes)
    assert (answer.status, answer.error["code"]) == (413, "batch_too_large")
    assert time.monotonic() - start < 5


def test_many_small_chunks_add_up_to_the_limit(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(POST + CHUNKED + b"\r\n")
        try:
            for _ in range(70):
                connection.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may stop listening once it has answered
        answer = received(connection)
    assert (answer.status, answer.error["code"]) == (413, "batch_too_large")


def test_the_body_limit_is_the_one_of_the_settings() -> None:
    assert f"client_max_body_size {ServeConfig().max_body_bytes // 2**20}m;" in CONFIG.read_text()


@pytest.mark.parametrize(
    "path",
    [
        "/-/healthz",
        "/-/routes",
        "/%2d/healthz",
        "/a/..//-/routes",
        "/-/413",
        "/-/500/service",
        "/metrics/x",
    ],
)
def test_paths_that_are_not_public_are_not_found(site: Site, path: str) -> None:
    answer = site.raw(f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    assert (answer.status, answer.error["code"]) == (404, "not_found")


def test_the_edge_passes_metrics_on(site: Site) -> None:
    answer = site.raw(b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")


def test_trace_is_not_allowed_and_a_long_address_is_refused(site: Site) -> None:
    answer = site.raw(b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    answer = site.raw(b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (answer.status, answer.error["code"]) == (414, "invalid_request")


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.stress)])
@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nX-A: ", POST + b"Content-Length: 100000\r\n\r\n"])
def test_slow_clients_do_not_delay_others_and_are_cut_off(site: Site, picture: bytes, start: bytes, count: int) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(site.connect()) for _ in range(count)]
        for connection in slow:
            connection.sendall(start)
        begun = time.monotonic()
        while time.monotonic() - begun < 4:
            sent = time.monotonic()
            assert detected(site, picture, "127.0.0.2").status_code == 200
            assert time.monotonic() - sent < 2.5
        time.sleep(max(0.0, begun + 6.5 - time.monotonic()))
        for connection in slow:
            connection.settimeout(1)
            assert closed(connection)


def closed(connection: socket.socket) -> bool:
    """Whether the edge has closed the connection, with or without an answer."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_an_address_with_too_many_connections_gets_429_and_others_do_not(site: Site, picture: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(128):
            connection = stack.enter_context(site.connect("127.0.0.3"))
            connection.sendall(POST + b"Content-Length: 100000\r\n\r\n")
        time.sleep(0.5)
        one_more = stack.enter_context(site.connect("127.0.0.3"))
        one_more.sendall(b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
        answer = received(one_more)
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (429, "overloaded", "1")
        assert detected(site, picture).status_code == 200


def test_the_log_is_json_without_query_strings_and_headers(site: Site) -> None:
    hostile = b"GET /docs?" + CANARY.encode() + b' HTTP/1.1\r\nHost: x\r\nConnection: close\r\nUser-Agent: "\n'
    site.raw(hostile + f"Authorization: {CANARY}\r\nReferer: {CANARY}\r\nX-Request-Id: {CANARY}\r\n\r\n".encode())
    site.raw(f"GET /?{CANARY} HTTP/1.1\r\nHost: x\r\nBad\0: {CANARY}\r\n\r\n".encode())
    time.sleep(0.2)
    text = (site.folder / "access.log").read_bytes().decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"time", "request_id", "client", "method", "path", "status", "seconds"} <= set(lines[-1])
    assert "/docs" in {line["path"] for line in lines}
    assert CANARY not in text + (site.folder / "error.log").read_text(errors="replace")


def test_without_a_server_behind_the_edge_the_answer_is_not_ready() -> None:
    with edge_before(free_port()) as site:
        answer = site.raw(POST + b"Content-Length: 3\r\n\r\nabc")
        assert (answer.status, answer.error["code"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "2"


@pytest.fixture(scope="module")
def plain_speaker() -> Iterator[Site]:
    """The edge in front of a server that answers as Serve's proxy does: /STATUS in plain text, with Retry-After: 7."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:]))
            self.send_header("Content-Type", "text/plain")
            self.send_header("Retry-After", "7")
            self.end_headers()
            self.wfile.write(b"Ping http://.../-/routes for available routes.")

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with edge_before(server.server_address[1]) as site:
        yield site
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (404, 503, "not_ready"),
        (408, 503, "not_ready"),
        (429, 429, "overloaded"),
        (500, 503, "not_ready"),
        (503, 503, "not_ready"),
        (504, 504, "timeout"),
    ],
)
def test_a_plain_text_error_of_ray_serve_gets_the_format_of_the_interface(
    plain_speaker: Site, said: int, status: int, code: str
) -> None:
    answer: Answer = plain_speaker.raw(f"GET /{said} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    assert (answer.status, answer.error["code"]) == (status, code)
    if status in (429, 503):
        assert answer.headers["retry-after"] == ("2" if said == 408 else "7")


def test_replicas_and_the_proxy_answer_in_one_write(site: Site) -> None:
    """A reader that is quicker than the writer would see the head of an answer alone."""
    _, _, block = (site.folder / "nginx.conf").read_text().partition("upstream serve {")
    replica, proxy = re.findall(r"server 127.0.0.1:(\d+)(?: backup)?;", block)
    for port in (replica, proxy):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
                assert connection.recv(65536).endswith(b'{"status":"ok"}')


def test_a_port_in_use_is_an_error_and_no_process_is_left(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(EdgeError, match=f"does not start on 127.0.0.1:{port}"),
            edge(f"127.0.0.1:{port}", ["127.0.0.1:1"], str(tmp_path)),
        ):
            raise AssertionError
    assert not (tmp_path / "nginx.pid").exists()
