"""Local disk, a real S3 server (moto in its own process) and a socket that lies: what is listed, read and refused."""

import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import boto3
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from clipflow_ray.config import AuditConfig, EvaluateConfig
from clipflow_ray.errors import ITEM_CODES, ImageError, InputError, ItemError, ReadError
from clipflow_ray.inputs.listing import check_apart
from clipflow_ray.place import HIDDEN, Place, settled
from tests.accounts import PICTURES, account, counts, tar

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


def reached(uri: str, endpoint: str) -> Place:
    """A place on an S3 server of this machine; the settings come from a config, as a user's do."""
    return Place(uri, AuditConfig(output="", s3={"endpoint_url": endpoint, "region": "us-east-1"}).s3)


def refusal(place: Place, max_bytes: int = 1000, etag: str | None = None) -> ReadError:
    with pytest.raises(ReadError) as caught:
        place.read(max_bytes, etag)
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
def store(credentials: None) -> Iterator[Place]:
    """The bucket `shelf` on a server of its own."""
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
        yield reached("s3://shelf", f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def bucket(store: Place) -> Any:
    """boto3's own client, so that what we list and read is not what we wrote ourselves."""
    client = boto3.client("s3", endpoint_url=store.options.endpoint_url, region_name=store.options.region)
    client.create_bucket(Bucket="shelf")
    for key in NASTY_KEYS:
        client.put_object(Bucket="shelf", Key=key, Body=key.encode())
    return client


class LiarServer(ThreadingHTTPServer):
    requests = 0
    faults = 0


class Liar(BaseHTTPRequestHandler):
    """Declares BODY's length but hangs up half way, as often as `faults` says; then sends it whole."""

    BODY = b"0123456789" * 1000
    server: LiarServer

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
def liar() -> Iterator[LiarServer]:
    server = LiarServer(("127.0.0.1", 0), Liar)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def lie_of(server: ThreadingHTTPServer) -> Place:
    return reached("s3://shelf/key", f"http://127.0.0.1:{server.server_port}")


@pytest.mark.parametrize("faults", [0, 2])
def test_a_body_that_breaks_off_twice_is_read_at_the_third_attempt(liar: LiarServer, faults: int) -> None:
    liar.faults = faults
    assert lie_of(liar).read(10**6) == Liar.BODY
    assert liar.requests == faults + 1


def test_a_body_that_always_breaks_off_is_read_failed_after_five_attempts(liar: LiarServer) -> None:
    liar.faults = 10**6
    assert refusal(lie_of(liar), 10**6).item_code == "read_failed"
    assert liar.requests == 5


def test_a_store_that_does_not_answer_is_read_failed() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        place = reached("s3://shelf/key", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert refusal(place).item_code == "read_failed"


def test_nasty_keys_are_listed_and_read_back(store: Place, bucket: Any) -> None:
    listed = list((store / "photos/").objects())
    assert sorted(item.uri for item in listed) == sorted(f"s3://shelf/{key}" for key in NASTY_KEYS)
    for item in listed:
        body = item.uri.removeprefix("s3://shelf/").encode()
        assert item.place.read(1000, item.etag) == body
        assert item.bytes == len(body)


def test_hidden_keys_and_folder_markers_are_left_out(store: Place, bucket: Any) -> None:
    for key in ("marked/", "marked/sub/", "marked/.hidden.jpg", "marked/seen.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")
    assert [item.uri for item in (store / "marked/").objects()] == ["s3://shelf/marked/seen.jpg"]


def test_hidden_folders_are_left_out_on_s3_as_they_are_on_disk(store: Place, bucket: Any) -> None:
    for key in ("tree/.cache/thumb.jpg", "tree/seen.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")
    assert [item.uri for item in (store / "tree/").objects()] == ["s3://shelf/tree/seen.jpg"]


@pytest.mark.parametrize("uri", ["s3://nowhere/photos", "s3://shelf/empty/", "s3:///photos"])
def test_a_prefix_that_holds_nothing_is_an_input_error(store: Place, bucket: Any, uri: str) -> None:
    with pytest.raises(InputError):
        list(store.with_uri(uri).objects())


@pytest.mark.parametrize("uri", ["s3://shelf/absent.jpg", "s3://nowhere/absent.jpg"])
def test_a_missing_key_is_not_found(store: Place, bucket: Any, uri: str) -> None:
    assert refusal(store.with_uri(uri)).item_code == "not_found"


def test_an_object_that_changed_after_its_listing_is_refused(store: Place, bucket: Any) -> None:
    bucket.put_object(Bucket="shelf", Key="changing/a.jpg", Body=b"before")
    (listed,) = (store / "changing/").objects()
    bucket.put_object(Bucket="shelf", Key="changing/a.jpg", Body=b"behind")
    assert refusal(listed.place, etag=listed.etag).item_code == "changed"
    assert listed.place.read(1000) == b"behind"


def test_an_object_above_the_limit_is_refused_and_one_at_the_limit_is_read(store: Place, bucket: Any) -> None:
    bucket.put_object(Bucket="shelf", Key="big.jpg", Body=b"x" * 100)
    assert refusal(store / "big.jpg", 99).item_code == "too_large_bytes"
    assert len((store / "big.jpg").read(100)) == 100


def test_a_body_above_the_limit_is_not_read(liar: LiarServer) -> None:
    liar.faults = 10**6  # reading this body fails, so a refusal by size must come first
    assert refusal(lie_of(liar), len(Liar.BODY) - 1).item_code == "too_large_bytes"
    assert liar.requests == 1


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder that is not there yet, on disk and on S3."""
    if request.param == "local":
        return Place.at(tmp_path / "deep" / "er")
    request.getfixturevalue("bucket")
    store: Place = request.getfixturevalue("store")
    return store / "run" / tmp_path.name


def test_text_is_written_whole_and_replaced(folder: Place) -> None:
    place = folder / "run.json"
    assert not place.exists() and folder.names() == []
    with pytest.raises(FileNotFoundError):
        place.read_text()
    for text in ("an old and long one", "ünï 😀\n"):
        place.write(text)
        assert place.read_text() == text
    assert place.exists() and not folder.exists()
    assert folder.names() == ["run.json"]
    place.delete()
    place.delete()
    assert not place.exists()


def test_what_is_left_of_a_file_is_written_whole_and_replaced(folder: Place) -> None:
    place = folder / "ledger.csv"
    for content in (bytes(20_000_000), b"short"):  # the first takes several parts on S3
        file = io.BytesIO(b"skipped" + content)
        file.seek(7)
        place.write_from(file)
        assert place.read(len(content)) == content
    assert folder.names() == ["ledger.csv"]


def test_a_reader_of_a_local_file_sees_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    place = Place.at(tmp_path / "run.json")
    place.write("old" * 1000)
    with open(place.uri, encoding="utf-8") as held:
        place.write("new")
        assert held.read() == "old" * 1000
    assert place.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_write_that_the_store_refuses_is_an_os_error(store: Place, bucket: Any) -> None:
    writes: tuple[Callable[[Place], object], ...] = (
        lambda p: p.write(b"x"),
        lambda p: p.write_if(b"x", None),
        lambda p: p.write_from(io.BytesIO(b"x")),
    )
    for write in writes:
        with pytest.raises(OSError, match="NoSuchBucket"):
            write(store.with_uri("s3://nowhere/key"))


def test_bytes_come_back_as_a_whole_as_a_stream_and_by_position(folder: Place) -> None:
    place = folder / "a.bin"
    place.write(b"0123456789")
    with place.stream() as file:
        assert file.read(3) + file.read() == b"0123456789"
    with place.open() as file:
        file.seek(7)
        assert file.read() == b"789"
    assert place.read(4, span=(2, 4)) == b"2345"
    assert refusal(place, 9).item_code == "too_large_bytes"


def test_tables_come_back_by_file_by_column_and_as_one_dataset(folder: Place) -> None:
    for name, start in (("a.parquet", 0), ("b.parquet", 3)):
        (folder / name).write_parquet(pa.table({"at": range(start, start + 3), "x": [1, 2, 3]}), row_group_size=2)
    assert (folder / "a.parquet").read_parquet(["at"]).to_pydict() == {"at": [0, 1, 2]}
    assert folder.parquet(["b.parquet", "a.parquet"]).to_table()["at"].to_pylist() == [3, 4, 5, 0, 1, 2]
    with (folder / "a.parquet").open() as file:
        assert pq.ParquetFile(file).metadata.num_row_groups == 2
    assert folder.names() == ["a.parquet", "b.parquet"]


def test_other_libraries_get_a_file_system_and_the_path_on_it(folder: Place) -> None:
    folder.make_folder()
    (folder / "a.parquet").write_parquet(pa.table({"at": [1, 2]}))
    given = folder.arguments("source", "filesystem")
    assert pads.dataset(**given).to_table()["at"].to_pylist() == [1, 2]


def test_a_folder_of_files_is_replaced(folder: Place) -> None:
    folder.write_folder({"a": b"1", "b": b"2"})
    folder.write_folder({"a": b"3", "c": b"4"})
    assert (folder / "a").read_text() == "3"
    assert folder.names() == (["a", "c"] if folder.is_local else ["a", "b", "c"])
    if folder.is_local:
        assert [path.name for path in Path(folder.uri).parent.iterdir()] == ["er"]


def test_a_conditional_write_holds_only_for_the_etag_that_is_there(store: Place, bucket: Any) -> None:
    place = store / "run/.lease"
    assert place.read_with_etag() is None
    first = place.write_if(b"1", None)
    assert first is not None and place.read_with_etag() == (b"1", first)
    assert place.write_if(b"2", None) is None
    second = place.write_if(b"3", first)
    assert second is not None and second != first
    assert place.write_if(b"4", first) is None
    assert place.read_with_etag() == (b"3", second)
    place.delete()
    assert place.read_with_etag() is None and place.write_if(b"5", second) is None


def test_a_prefix_that_is_a_folder_takes_no_other_folder_and_another_one_loses_nothing(
    store: Place, bucket: Any
) -> None:
    for key in ("images/a.jpg", "images-old/b.jpg", "images.jpg", "2024.01.02/x.jpg", "2024.01.03/.h.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")

    def under(prefix: str) -> list[str]:
        return [item.uri.removeprefix("s3://shelf/") for item in store.with_uri(f"s3://shelf/{prefix}").objects()]

    assert under("images") == under("images/") == ["images/a.jpg"]
    assert under("2024") == ["2024.01.02/x.jpg"]
    assert under("images.jpg") == ["images.jpg"]
    assert under("images-") == ["images-old/b.jpg"]
    found = [store.with_uri(f"s3://shelf/{name}").found() for name in ("images", "images.jpg", "2024", "nothing")]
    assert [getattr(each, "uri", None) for each in found] == [
        "s3://shelf/images/",
        "s3://shelf/images.jpg",
        "s3://shelf/2024",
        None,
    ]


def test_what_is_hidden_is_counted(store: Place, bucket: Any, tmp_path: Path) -> None:
    for name in ("counted/a.jpg", "counted/.h.jpg", "counted/.c/b.jpg", "counted/d/._a.jpg"):
        bucket.put_object(Bucket="shelf", Key=name, Body=b"x")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for place in (store / "counted/", Place.at(tmp_path / "counted")):
        left_out: Counter[str] = Counter()
        names = [item.place.name for item in place.objects(left_out=left_out)]
        assert sorted(names) == ["._a.jpg", "a.jpg"] and dict(left_out) == {HIDDEN: 2}


def test_an_object_with_slashes_in_a_row_opens_as_a_file_and_ends_where_it_ends(store: Place, bucket: Any) -> None:
    body = bytes(range(256)) * 1000
    bucket.put_object(Bucket="shelf", Key="odd//a/./b", Body=body)
    place = store.with_uri("s3://shelf/odd//a/./b")
    with place.open() as file:
        assert file.read(5) == body[:5]
        file.seek(-3, os.SEEK_END)
        assert file.read() == body[-3:] and file.read(1) == b""
    with place.stream() as file:
        assert file.read() == body
    for missing in ("s3://shelf/odd/b", "s3://nowhere/b"):
        with pytest.raises(FileNotFoundError):
            store.with_uri(missing).open()


class Picky(BaseHTTPRequestHandler):
    """A store that is busy twice, and keeps what it was asked."""

    protocol_version = "HTTP/1.1"  # answers `Expect: 100-continue`, for which boto3 would wait a second
    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []
    answers: ClassVar[list[tuple[int, str]]] = []

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, {name.lower(): value for name, value in self.headers.items()}))
        status, code = self.answers.pop(0) if self.answers else (200, "")
        body = f"<Error><Code>{code}</Code></Error>".encode() if code else b"<ListBucketResult></ListBucketResult>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def picky() -> Iterator[Place]:
    Picky.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Picky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    s3 = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region": "us-east-1", "request_payer": True}
    yield Place("s3://shelf/key", AuditConfig(output="", s3=s3).s3)
    server.shutdown()
    server.server_close()


def test_every_request_to_a_requester_pays_bucket_says_who_pays(picky: Place) -> None:
    picky.read(10**6)
    picky.write(b"x")
    picky.write_if(b"x", None)
    list((picky / "").objects(required=False))
    picky.found()
    picky.folders()
    picky.open().close()
    assert len(Picky.asked) == 7 and {method for method, _ in Picky.asked} == {"GET", "PUT", "HEAD"}
    assert all(headers.get("x-amz-request-payer") == "requester" for _, headers in Picky.asked)


def test_a_write_has_no_checksum_that_other_stores_refuse(picky: Place) -> None:
    picky.write(b"x")
    ((_, headers),) = Picky.asked
    assert not [name for name in headers if name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer"))]


@pytest.mark.parametrize("busy", [(503, "SlowDownWrite"), (429, "TooManyRequests"), (400, "RequestThrottled")])
def test_a_busy_store_is_asked_again(picky: Place, busy: tuple[int, str]) -> None:
    for ask in (lambda: picky.write(b"x"), lambda: picky.read(10**6), lambda: list((picky / "").objects(False))):
        Picky.answers[:] = [busy]
        ask()
        assert not Picky.answers and len(Picky.asked) == 2
        Picky.asked.clear()


def test_an_output_inside_an_input_on_s3_is_refused_and_one_beside_it_is_not(store: Place, bucket: Any) -> None:
    for key in ("taken/a.jpg", "takes.1/a.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")
    with pytest.raises(InputError, match="inside the input"):
        check_apart([store / "taken"], store / "taken/out")
    with pytest.raises(InputError, match="inside the input"):  # a prefix that is no folder would list the output
        check_apart([store / "takes"], store / "takes-out")
    check_apart([store / "taken", store / "nothing"], store / "taken-out")


def test_tables_and_archives_are_read_from_keys_with_slashes_in_a_row(
    store: Place, bucket: Any, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"image": list(PICTURES)}), tmp_path / "a.parquet")
    files = {
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
        "b.tar": tar(tmp_path / "b.tar").read_bytes(),
        "c.tar.gz": tar(tmp_path / "c.tar.gz", mode="w:gz").read_bytes(),
        "list.csv": b"uri\nx.jpg\n./x.jpg\n",
        "x.jpg": PICTURES[0],
    }
    for name, content in files.items():
        bucket.put_object(Bucket="shelf", Key=f"many//{name}", Body=content)
    found = account(store / "many", store.with_uri("s3://shelf/many//list.csv"))
    assert counts(found) == {"ok": 15, "skipped_not_image": 1}
    assert {row["uri"] for row in found} == {f"s3://shelf/many//{name}" for name in files}
    pattern = account(store.with_uri("s3://shelf/many//{a,b}.*"))
    assert counts(pattern) == {"ok": 8}


def test_folders_are_listed_apart_only_if_they_hold_everything(store: Place, bucket: Any, tmp_path: Path) -> None:
    for key in ("parted/a/1.jpg", "parted/b/2.jpg", "parted/.c/3.jpg", "mixed/a/1.jpg", "mixed/b/2.jpg", "mixed/3.jpg"):
        bucket.put_object(Bucket="shelf", Key=key, Body=b"x")
    assert [folder.uri for folder in (store / "parted/").folders()] == ["s3://shelf/parted/a/", "s3://shelf/parted/b/"]
    assert (store / "mixed/").folders() == [store / "mixed/"]
    assert (store / "parted/a/").folders() == [store / "parted/a/"]
    assert Place.at(tmp_path).folders() == [Place.at(tmp_path)]


def test_local_files_are_listed_in_order_without_hidden_ones(tmp_path: Path) -> None:
    seen = ["a.jpg", "b.jpg", *(f"{folder}/deep/{folder}.jpg" for folder in "cdefghijk")]
    for name in [*reversed(seen[::2]), *seen[1::2], ".hidden.jpg", ".git/x.jpg", "c/.thumb.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    listed = list(Place.at(tmp_path).objects())
    assert [item.uri for item in listed] == [f"{tmp_path}/{name}" for name in seen]
    assert [item.bytes for item in listed] == [len(name) for name in seen]
    assert [item.uri for item in Place.at(f"{tmp_path}/a.jpg").objects()] == [f"{tmp_path}/a.jpg"]


def test_an_empty_or_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for uri in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InputError, match=str(uri)):
            list(Place.at(uri).objects())


def test_local_reads_keep_the_limit_and_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 100)
    place = Place.at(path)
    assert place.read(100) == b"x" * 100
    assert refusal(place, 99).item_code == "too_large_bytes"
    assert refusal(Place.at(tmp_path / "absent.jpg")).item_code == "not_found"
    assert refusal(Place.at(tmp_path), 10**6).item_code == "read_failed"


@pytest.mark.parametrize("uri", ["photos/a.jpg", "/photos/../a.jpg", "s3://shelf/../a", "http://shelf/a", "/a\0b", ""])
def test_a_uri_from_a_list_that_is_no_absolute_place_is_a_bad_uri(uri: str) -> None:
    assert refusal(Place.at("/").with_uri(uri)).item_code == "bad_uri"


def test_a_pipe_among_the_files_is_refused_and_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            Place.at(path).read(1000)
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


def test_local_paths_become_absolute_and_s3_uris_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Place.at("a//b/../c/").uri == f"{tmp_path}/a/c"
    assert Place.at("~/photos").uri == "/home/me/photos"
    assert Place.at("s3://shelf/a//../b/").uri == "s3://shelf/a//../b/"
    assert not Place.at("s3://shelf").is_local and Place("/s3://shelf").is_local


@pytest.mark.parametrize(
    "uri", ["http://169.254.169.254/latest", "https://a/b", "file:///etc/passwd", "gs://a", "S3://a"]
)
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(InputError):
        Place.at(uri)
    with pytest.raises(InputError):
        settled(AuditConfig(input=(uri,), output="out"), "input")


def test_every_slash_of_a_key_counts(store: Place, bucket: Any) -> None:
    for key in ("slashes/a//b", "slashes//a", "/slashes"):
        bucket.put_object(Bucket="shelf", Key=key, Body=key.encode())
        assert Place(f"s3://shelf/{key}", store.options).read(100) == key.encode()


def test_a_child_is_one_slash_below() -> None:
    assert Place.at("s3://b/a/") / "x" / "y" == Place.at("s3://b/a") / "x/y" == Place.at("s3://b/a/x/y")
    assert (Place.at("/") / "x").uri == "/x"


def test_a_place_knows_its_name_and_its_root() -> None:
    assert [Place.at(uri).name for uri in ("s3://b/a/x/", "s3://b/a/x", "/a/x")] == ["x", "x", "x"]
    assert [Place.at(uri).root.uri for uri in ("s3://b/a/x/", "s3://b", "/a/x")] == ["s3://b", "s3://b", "/"]


@pytest.mark.parametrize(
    ("outer", "inner", "holds"),
    [
        ("/a", "/a/b", True),
        ("/a", "/a", True),
        ("/", "/a", True),
        ("/a", "/ab", False),
        ("/a/b", "/a", False),
        ("s3://b/a", "s3://b/ab", True),
        ("s3://b/a/", "s3://b/ab", False),
        ("s3://b/a/", "s3://b/a", False),
        ("s3://b/a/", "/b/a/c", False),
        ("/", "s3://b/a", False),
    ],
)
def test_a_folder_holds_what_is_below_it_and_a_prefix_what_begins_with_it(outer: str, inner: str, holds: bool) -> None:
    assert Place.at(outer).holds(Place.at(inner)) == holds


def test_options_take_the_environment_but_not_over_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    chosen = {"endpoint_url": "http://mine", "region": "us-west-2", "unsigned": True, "request_payer": True}
    environment = {"endpoint_url": "http://special", "region": "eu-north-1", "unsigned": False, "request_payer": False}
    for s3, expected in (
        ({}, environment),
        (chosen, chosen),
    ):
        config = EvaluateConfig(natural=("a",), output="s3://b/out/", s3=s3)
        assert Place.at("s3://b", config.s3).options.model_dump() == expected
        filled = settled(config, "natural", "output")
        assert filled.s3.model_dump() == expected
        assert (filled.natural, filled.output) == ((os.path.abspath("a"),), "s3://b/out/")


def test_a_place_is_a_value_that_travels_and_shows_its_uri_alone(store: Place) -> None:
    place = store / "key"
    assert pickle.loads(pickle.dumps(place)) == place and hash(place) == hash(store / "key")
    assert place != Place("s3://shelf/key")
    assert repr(place) == "Place(uri='s3://shelf/key')"


@pytest.mark.parametrize("kind", [ItemError, ReadError, ImageError])
def test_item_errors_survive_pickling(kind: type[ItemError]) -> None:
    error = pickle.loads(pickle.dumps(kind("not_found", "It is not there.")))
    assert (type(error), error.item_code, str(error)) == (kind, "not_found", "It is not there.")
