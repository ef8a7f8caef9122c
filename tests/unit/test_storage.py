"""Local disk, a real S3 server (moto in its own process) and a socket that lies: what is listed, read and refused."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from clipflow_ray.config import S3Options
from clipflow_ray.errors import ITEM_CODES, ImageError, InputError, ItemError, ReadError
from clipflow_ray.storage import (
    ObjectReader,
    exists,
    is_s3,
    join,
    list_objects,
    normalized,
    read_text,
    resolved,
    split_s3,
    write_text,
)

LOCAL = S3Options()
NASTY_KEYS = [
    "photos/plain.jpg",
    "photos/a space.jpg",
    "photos/a+plus.jpg",
    "photos/per%2Fcent.jpg",
    "photos//double.jpg",
    "photos/./dot.jpg",
    "photos/ünïcødé-😀.jpg",
    'photos/it\'s "quoted".jpg',
    "photos/q?a=1&b=2#c.jpg",
    "photos/" + "k" * 200 + ".jpg",
]


def refusal(reader: ObjectReader, uri: str, max_bytes: int = 1000, etag: str | None = None) -> ReadError:
    with pytest.raises(ReadError) as caught:
        reader.read(uri, max_bytes, etag)
    assert caught.value.item_code in ITEM_CODES
    return caught.value


@pytest.fixture(scope="module", autouse=True)
def credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        yield


@pytest.fixture(scope="module")
def s3(credentials: None) -> Iterator[S3Options]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "3"}  # every listing below takes several pages
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto did not start"
                time.sleep(0.1)
        yield S3Options(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1")
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def bucket(s3: S3Options):
    client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name=s3.region)
    client.create_bucket(Bucket="shelf")
    for key in NASTY_KEYS:
        client.put_object(Bucket="shelf", Key=key, Body=key.encode())
    return client


class Liar(BaseHTTPRequestHandler):
    """Declares BODY's length but hangs up half way, as often as `faults` says; then sends it whole."""

    BODY = b"0123456789" * 1000

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.BODY)))
        self.end_headers()
        cut = self.server.requests <= self.server.faults
        self.wfile.write(self.BODY[: len(self.BODY) // 2] if cut else self.BODY)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.requests = server.faults = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def reader_of(server: ThreadingHTTPServer) -> ObjectReader:
    return ObjectReader(S3Options(endpoint_url=f"http://127.0.0.1:{server.server_port}", region="us-east-1"))


@pytest.mark.parametrize("faults", [0, 2])
def test_a_body_that_breaks_off_twice_is_read_at_the_third_attempt(liar: ThreadingHTTPServer, faults: int) -> None:
    liar.faults = faults
    assert reader_of(liar).read("s3://shelf/key", 10**6) == Liar.BODY
    assert liar.requests == faults + 1


def test_a_body_that_always_breaks_off_is_read_failed_after_five_attempts(liar: ThreadingHTTPServer) -> None:
    liar.faults = 10**6
    assert refusal(reader_of(liar), "s3://shelf/key", 10**6).item_code == "read_failed"
    assert liar.requests == 5


def test_a_store_that_does_not_answer_is_read_failed() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        options = S3Options(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", region="us-east-1")
        assert refusal(ObjectReader(options), "s3://shelf/key").item_code == "read_failed"


def test_nasty_keys_are_listed_and_read_back(s3: S3Options, bucket) -> None:
    reader = ObjectReader(s3)
    listed = list(list_objects("s3://shelf/photos/", s3))
    assert sorted(item.uri for item in listed) == sorted(f"s3://shelf/{key}" for key in NASTY_KEYS)
    for item in listed:
        body = item.uri.removeprefix("s3://shelf/").encode()
        assert reader.read(item.uri, 1000, item.etag) == body
        assert item.bytes == len(body)


def test_hidden_keys_and_folder_markers_are_left_out(s3: S3Options, bucket) -> None:
    for key in ("marked/", "marked/sub/", "marked/.hidden.jpg", "marked/seen.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")
    assert [item.uri for item in list_objects("s3://shelf/marked/", s3)] == ["s3://shelf/marked/seen.jpg"]


def test_hidden_folders_are_left_out_on_s3_as_they_are_on_disk(s3: S3Options, bucket) -> None:
    for key in ("tree/.cache/thumb.jpg", "tree/seen.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")
    assert [item.uri for item in list_objects("s3://shelf/tree/", s3)] == ["s3://shelf/tree/seen.jpg"]


@pytest.mark.parametrize("uri", ["s3://nowhere/photos", "s3://shelf/empty/", "s3:///photos"])
def test_a_prefix_that_holds_nothing_is_an_input_error(s3: S3Options, bucket, uri: str) -> None:
    with pytest.raises(InputError):
        list(list_objects(uri, s3))


@pytest.mark.parametrize("uri", ["s3://shelf/absent.jpg", "s3://nowhere/absent.jpg"])
def test_a_missing_key_is_not_found(s3: S3Options, bucket, uri: str) -> None:
    assert refusal(ObjectReader(s3), uri).item_code == "not_found"


def test_an_object_that_changed_after_its_listing_is_refused(s3: S3Options, bucket) -> None:
    bucket.put_object(Bucket="shelf", Key="changing/a.jpg", Body=b"before")
    (listed,) = list_objects("s3://shelf/changing/", s3)
    bucket.put_object(Bucket="shelf", Key="changing/a.jpg", Body=b"behind")
    error = refusal(ObjectReader(s3), listed.uri, etag=listed.etag)
    assert error.item_code == "changed"
    assert ObjectReader(s3).read(listed.uri, 1000) == b"behind"


def test_an_object_above_the_limit_is_refused_and_one_at_the_limit_is_read(s3: S3Options, bucket) -> None:
    bucket.put_object(Bucket="shelf", Key="big.jpg", Body=b"x" * 100)
    assert refusal(ObjectReader(s3), "s3://shelf/big.jpg", 99).item_code == "too_large_bytes"
    assert len(ObjectReader(s3).read("s3://shelf/big.jpg", 100)) == 100


def test_a_body_above_the_limit_is_not_read(liar: ThreadingHTTPServer) -> None:
    liar.faults = 10**6  # reading this body fails, so a refusal by size must come first
    assert refusal(reader_of(liar), "s3://shelf/key", len(Liar.BODY) - 1).item_code == "too_large_bytes"
    assert liar.requests == 1


@pytest.mark.parametrize("store", ["local", "s3"])
def test_text_is_written_whole_and_replaced(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if store == "s3":
        options, uri = request.getfixturevalue("s3"), "s3://shelf/run/deep/run.json"
        request.getfixturevalue("bucket")
    else:
        options, uri = LOCAL, str(tmp_path / "deep" / "er" / "run.json")
    assert not exists(uri, options)
    with pytest.raises(FileNotFoundError):
        read_text(uri, options)
    for text in ("an old and long one", "ünï 😀\n"):
        write_text(uri, text, options)
        assert read_text(uri, options) == text
    assert exists(uri, options)
    assert not exists(uri.rsplit("/", 1)[0], options)
    if store == "local":
        assert [path.name for path in Path(uri).parent.iterdir()] == ["run.json"]


def test_a_reader_of_a_local_file_sees_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    uri = str(tmp_path / "run.json")
    write_text(uri, "old" * 1000, LOCAL)
    with open(uri, encoding="utf-8") as held:
        write_text(uri, "new", LOCAL)
        assert held.read() == "old" * 1000
    assert read_text(uri, LOCAL) == "new"


def test_local_files_are_listed_in_order_without_hidden_ones(tmp_path: Path) -> None:
    seen = ["a.jpg", "b.jpg", *(f"{folder}/deep/{folder}.jpg" for folder in "cdefghijk")]
    for name in [*reversed(seen[::2]), *seen[1::2], ".hidden.jpg", ".git/x.jpg", "c/.thumb.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    listed = list(list_objects(str(tmp_path), LOCAL))
    assert [item.uri for item in listed] == [f"{tmp_path}/{name}" for name in seen]
    assert [item.bytes for item in listed] == [len(name) for name in seen]
    assert [item.uri for item in list_objects(f"{tmp_path}/a.jpg", LOCAL)] == [f"{tmp_path}/a.jpg"]


def test_an_empty_or_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for uri in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InputError, match=str(uri)):
            list(list_objects(str(uri), LOCAL))


def test_local_reads_keep_the_limit_and_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 100)
    reader = ObjectReader(LOCAL)
    assert reader.read(str(path), 100) == b"x" * 100
    assert refusal(reader, str(path), 99).item_code == "too_large_bytes"
    assert refusal(reader, f"{tmp_path}/absent.jpg").item_code == "not_found"
    assert refusal(reader, str(tmp_path), 10**6).item_code == "read_failed"


def test_a_pipe_among_the_files_is_refused_and_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            ObjectReader(LOCAL).read(str(path), 1000)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(2)
    if blocked := thread.is_alive():
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets the reader go
        thread.join(5)
    assert not blocked, "reading a pipe blocks"
    assert [type(error) for error in caught] == [ReadError]


def test_local_paths_become_absolute_and_s3_uris_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert normalized("a//b/../c/") == f"{tmp_path}/a/c"
    assert normalized("~/photos") == "/home/me/photos"
    assert normalized("s3://shelf/a//../b/") == "s3://shelf/a//../b/"
    assert is_s3("s3://shelf") and not is_s3("/s3://shelf")


@pytest.mark.parametrize(
    "uri", ["http://169.254.169.254/latest", "https://a/b", "file:///etc/passwd", "gs://a", "S3://a"]
)
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(InputError):
        normalized(uri)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [("s3://b/a//b", ("b", "a//b")), ("s3://b//a", ("b", "/a")), ("s3://b/a/", ("b", "a/")), ("s3://b", ("b", ""))],
)
def test_splitting_an_s3_uri_keeps_every_slash_of_its_key(uri: str, parts: tuple[str, str]) -> None:
    assert split_s3(uri) == parts


def test_joining_adds_one_slash() -> None:
    assert join("s3://b/a/", "x", "y") == join("s3://b/a", "x", "y") == "s3://b/a/x/y"


def test_options_take_the_environment_but_not_over_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert resolved(LOCAL) == S3Options(endpoint_url="http://special", region="eu-north-1")
    chosen = S3Options(endpoint_url="http://mine", region="us-west-2", unsigned=True)
    assert resolved(chosen) == chosen


@pytest.mark.parametrize("kind", [ItemError, ReadError, ImageError])
def test_item_errors_survive_pickling(kind: type[ItemError]) -> None:
    error = pickle.loads(pickle.dumps(kind("not_found", "It is not there.")))
    assert (type(error), error.item_code, str(error)) == (kind, "not_found", "It is not there.")
