"""An audit through a proxy that gives some requests the faults that S3 can have."""

import http.client
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig, ImageLimits
from clipflow_ray.errors import InputError, ReadError
from clipflow_ray.place import Place
from tests.conftest import encoded, photo, s3_client

OBJECTS = 300
# Faults of the first GET of an object, by the object's number. 5 % are 503; 500, reset, truncated and flipped are 1 %
# each. One stall and one dribble last until a timeout.
FAULTS = {20 * at: "503" for at in range(15)}
FAULTS |= {7 + 100 * at: "500" for at in range(3)} | {11 + 100 * at: "reset" for at in range(3)}
FAULTS |= {13 + 100 * at: "truncated" for at in range(3)} | {17 + 100 * at: "flipped" for at in range(3)}
FAULTS |= {19: "stall", 119: "dribble"}


class Chaos(ThreadingHTTPServer):
    """Forwards to `upstream`. The first GET of a key in FAULTS fails as listed, and every GET of a key in `always`."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.gets: Counter[str] = Counter()
        self.always: dict[str, str] = {}
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    def fault(self, key: str) -> str | None:
        self.gets[key] += 1
        if key in self.always:
            return self.always[key]
        number = key.rsplit("/", 1)[-1].removesuffix(".jpg")
        return FAULTS.get(int(number)) if number.isdigit() and self.gets[key] == 1 else None

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients are expected to close connections early."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Chaos

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = urllib.parse.urlsplit(self.path).path
        fault = self.server.fault(key) if self.command == "GET" and key.endswith(".jpg") else None
        if fault in ("503", "500", "403"):
            code = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}[fault]
            self.answer(int(fault), {}, f"<Error><Code>{code}</Code></Error>".encode())
        elif fault == "stall":
            self.server.ended.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            upstream = http.client.HTTPConnection(self.server.upstream)
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            content = response.read()
            headers = {
                k: v for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "date", "server")
            }
            upstream.close()
            self.answer(response.status, headers, content, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def answer(self, status: int, headers: dict[str, str], content: bytes, fault: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(content))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "flipped":
            middle = len(content) // 2
            self.wfile.write(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        elif fault == "dribble":
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.ended.wait(0.2):
                    return
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def chaos(s3: Place) -> Iterator[Chaos]:
    server = Chaos(str(s3.options.endpoint_url))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bucket(s3: Place) -> str:
    client = s3_client(s3)
    client.create_bucket(Bucket="chaos")
    for at in range(OBJECTS):
        client.put_object(Bucket="chaos", Key=f"in/{at}.jpg", Body=encoded(photo(5000 + at % 50, (224, 230))))
    return "s3://chaos/in/"


def through(chaos: Chaos, s3: Place) -> Place:
    return Place(s3.uri, s3.options.model_copy(update={"endpoint_url": f"http://127.0.0.1:{chaos.server_port}"}))


def test_every_good_object_is_scored_through_faults_and_few_are_read_twice(
    cluster: None, trained: str, chaos: Chaos, s3: Place, bucket: str, tmp_path: Path
) -> None:
    config = AuditConfig(
        input=(bucket,), output=str(tmp_path / "calm"), checkpoint=trained, alpha=0.1, s3=s3.options, gallery=0
    )
    calm = audit(config)
    record = audit(config.model_copy(update={"output": str(tmp_path / "chaos"), "s3": through(chaos, s3).options}))
    assert record.by_status == calm.by_status == {"ok": OBJECTS}
    scores = [{row["row_id"]: row["score"] for row in pq.read_table(r.ledger).to_pylist()} for r in (calm, record)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    faults = sum(1 for number in FAULTS if number < OBJECTS)
    assert OBJECTS + faults <= sum(chaos.gets.values()) <= 1.15 * OBJECTS


def test_a_lasting_fault_raises_its_error_code_in_time(
    chaos: Chaos, s3: Place, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = through(chaos, s3).with_uri(bucket)
    expected = {"503": "read_failed", "truncated": "read_failed", "flipped": "read_failed", "403": "access_denied"}
    for number, (fault, code) in enumerate(expected.items(), 200):
        chaos.always[f"/chaos/in/{number}.jpg"] = fault
        with pytest.raises(ReadError) as caught:
            (images / f"{number}.jpg").read(ImageLimits().max_bytes)
        assert caught.value.item_code == code
        assert chaos.gets[f"/chaos/in/{number}.jpg"] == (1 if fault == "403" else 5)
    monkeypatch.setattr("clipflow_ray.place.READ_SECONDS", 1.5)
    chaos.always["/chaos/in/210.jpg"] = "dribble"
    start = time.monotonic()
    with pytest.raises(ReadError) as caught:
        (images / "210.jpg").read(ImageLimits().max_bytes)
    assert caught.value.item_code == "read_timeout" and time.monotonic() - start < 10


def test_credentials_that_allow_listing_but_not_reading_fail_the_audit_at_once(
    cluster: None, trained: str, chaos: Chaos, s3: Place, bucket: str, tmp_path: Path
) -> None:
    chaos.always = {f"/chaos/in/{at}.jpg": "403" for at in range(OBJECTS)}
    config = AuditConfig(
        input=(bucket,), output=str(tmp_path / "run"), checkpoint=trained, alpha=0.1, s3=through(chaos, s3).options
    )
    with pytest.raises(InputError, match="allow listing but not reading"):
        audit(config)
    assert sum(chaos.gets.values()) < 20
