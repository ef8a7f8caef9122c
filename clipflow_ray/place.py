"""A place: a URI together with the options to reach it. Only this file uses the interfaces of a store.

Objects on `s3://` are read and written by boto3, which takes any key and has typed errors. Objects on disk are read and
written by the operating system. The folders that a run writes use pyarrow's file systems, which Ray Data takes as well.
Credentials come from the credential chains of boto3 and pyarrow and are never part of a place. URIs stay `str`,
because a `Path` would drop the second slash of `s3://`.
"""

import io
import os
import random
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast

import boto3
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from boto3.exceptions import Boto3Error
from botocore import UNSIGNED
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
from urllib3.exceptions import HTTPError

from clipflow_ray.config import AuditConfig, CalibrateConfig, EvaluateConfig, RescoreConfig, S3Options, TrainConfig
from clipflow_ray.errors import InputError, ItemCode, ReadError

READ_SECONDS: Final = 30.0
_READ_ATTEMPTS: Final = 5
_FIRST_PAUSE: Final = 0.1
HIDDEN: Final = "hidden files or folders (leading dot)"
_BODY_SECONDS: Final = 5.0
_SLOWEST: Final = 1e6  # bytes per second; a slower body is given up
_DENIED: Final = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
# Codes of a busy store: of AWS, MinIO (SlowDownRead, SlowDownWrite), R2 (TooManyRequests) and Ceph.
_BUSY: Final = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_MISSING: Final = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}
# Codes of a store if the condition of a write does not hold; NoSuchKey if the object to be matched is gone.
_UNMET: Final = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
_BUFFER: Final = 2**16
_STREAM_BUFFER: Final = 2**22
_CLIENTS: Final = threading.Lock()
_DEFAULT: Final = S3Options()

ConfigT = TypeVar("ConfigT", AuditConfig, CalibrateConfig, EvaluateConfig, RescoreConfig, TrainConfig)


@dataclass(frozen=True)
class Place:
    """An object, a folder or an s3 prefix, and the options to reach it. Hashable, picklable; its repr is only the URI.

    Use `at` for a URI that a user gave. The constructor takes the URI as it is.
    """

    uri: str
    options: S3Options = field(default=_DEFAULT, repr=False)

    @classmethod
    def at(cls, uri: str | os.PathLike[str], options: S3Options = _DEFAULT) -> "Place":
        """The place of an s3 URI, which stays as it is, or of a local path, which is made absolute.

        Takes missing options from this process's environment, so that workers on other machines see the same endpoint.
        Raises InputError for any other scheme.
        """
        return cls(_normalized(os.fspath(uri)), _resolved(options))

    @classmethod
    def new_bucket(cls, name: str, endpoint_url: str) -> "Place":
        """Create a bucket on an S3 server that a demo or a test has just started. No other bucket is ever created."""
        place = cls(f"s3://{name}", S3Options(endpoint_url=endpoint_url, region="us-east-1"))
        with _failing_as_os_error(f"Cannot create {place.uri}"):
            _client(place.options).create_bucket(Bucket=name)
        return place

    def __truediv__(self, name: str) -> "Place":
        """A child of a folder or prefix; `name` may hold slashes."""
        return self.with_uri(f"{self.uri.rstrip('/')}/{name}")

    def with_uri(self, uri: str) -> "Place":
        """The place of another URI, which is taken as it is, with the same options."""
        return Place(uri, self.options)

    @property
    def name(self) -> str:
        """The last component of the URI."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def root(self) -> "Place":
        """The bucket, or the root of the local disk."""
        return self.with_uri("/" if self.is_local else "/".join(self.uri.split("/")[:3]))

    @property
    def is_local(self) -> bool:
        """Whether the place is on disk, not in an object store."""
        return not self.uri.startswith("s3://")

    def holds(self, other: "Place") -> bool:
        """Whether `other` is this place or lies below it: below a folder on disk, below a prefix on s3."""
        if self.is_local:
            return f"{other.uri}/".startswith(f"{self.uri.rstrip('/')}/")
        return other.uri.startswith(self.uri)

    # Objects of an input. They are untrusted, so each read has a size limit and every failure has a code.

    def found(self) -> "Place | StoredObject | None":
        """What the URI names: a folder, an object, or None if there is nothing.

        On s3, `s3://b/images` names the object of that key, or else the folder `s3://b/images/`, or else every key that
        begins so, such as `s3://b/images-1/a.jpg`. The URI of a folder on s3 ends with a slash. Raises InputError if
        the store refuses to list.
        """
        if not self.is_local:
            return _found_s3(self)
        if os.path.isdir(self.uri):
            return self
        return _stored_local(self) if os.path.lexists(self.uri) else None

    def objects(
        self,
        required: bool = True,
        enters: Callable[[str], bool] | None = None,
        left_out: Counter[str] | None = None,
    ) -> Iterator["StoredObject"]:
        """Every object under a folder or a prefix, or the one object that the URI names; sorted within a folder.

        Hidden names (leading dot) and empty folder markers are left out, except for `._` files, which macOS writes
        beside pictures. `enters` says whether a folder on disk, given by its path, is walked. `left_out` counts what is
        left out, by its reason. A linked folder is walked if it lies outside. Raises InputError if the store refuses
        the listing, or if there is no object and `required` is true.
        """
        counted: Counter[str] = Counter() if left_out is None else left_out
        some = False
        found = self.found()
        listed: Iterator[StoredObject] = iter(())
        if isinstance(found, StoredObject):
            listed = iter([found])
        elif found is not None:
            listed = _list_local(found, enters, counted) if self.is_local else _list_s3(found, counted)
        for item in listed:
            some = True
            yield item
        if required and not some:
            raise InputError(f"{self.uri} holds no objects: check the path, or the prefix and its bucket.")

    def folders(self, left_out: Counter[str] | None = None) -> list["Place"]:
        """The first folders under an s3 prefix, to be listed in parallel; together they hold all its objects.

        Only the place itself on disk, if there are fewer than two folders, or if there are objects beside the folders.
        `left_out` counts hidden folders.
        """
        return [self] if self.is_local else _folders_s3(self, Counter() if left_out is None else left_out)

    def read(self, max_bytes: int, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
        """The object's bytes, or those of `span` (offset, size).

        Raises ReadError with bad_uri, not_found, access_denied, read_timeout, read_failed or too_large_bytes, and
        with changed if the object's ETag is not `etag`. On s3, errors of the store, incomplete bodies and bodies with a
        wrong checksum are retried: five attempts within 30 seconds.
        """
        if "\0" in self.uri or ".." in self.uri.split("/") or (self.is_local and not self.uri.startswith("/")):
            raise ReadError("bad_uri", "Only s3:// URIs and local paths without `..` are read.")
        if span and span[1] > max_bytes:
            raise ReadError("too_large_bytes", f"{span[1]} bytes; the limit is {max_bytes}.")
        return _read_local(self.uri, max_bytes, span) if self.is_local else _read_s3(self, max_bytes, etag, span)

    # Files that this package writes, and containers. A failure is an OSError; FileNotFoundError if the file is missing.

    def read_text(self) -> str:
        """The text of a small UTF-8 object."""
        with self.stream() as file:
            return file.read().decode()

    def write(self, data: bytes | str) -> None:
        """Write an object atomically: readers see the old one or the new one. Text is written as UTF-8."""
        content = data.encode() if isinstance(data, str) else data
        if self.is_local:
            _write_local(Path(self.uri), content)
        else:
            with _failing_as_os_error(f"Cannot write {self.uri}"):
                _client(self.options).put_object(**_address(self), Body=content)

    def write_from(self, file: BinaryIO) -> None:
        """Write what is left of `file` atomically, without holding it in memory."""
        if self.is_local:
            target = Path(self.uri)
            with _replacing(target) as partial, partial.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        else:
            bucket, key = _split_s3(self.uri)
            with _failing_as_os_error(f"Cannot write {self.uri}"):
                _client(self.options).upload_fileobj(file, bucket, key, ExtraArgs=_paying(self.options))

    def delete(self) -> None:
        """Delete the object. Nothing happens if there is none."""
        if self.is_local:
            Path(self.uri).unlink(missing_ok=True)
        else:
            with _failing_as_os_error(f"Cannot delete {self.uri}"):
                _client(self.options).delete_object(**_address(self))

    def exists(self) -> bool:
        """Whether the object exists. A folder is not an object."""
        fs, path = self._file_system()
        return bool(fs.get_file_info(path).type == pafs.FileType.File)

    def open(self) -> BinaryIO:
        """A file object that can seek; the caller closes it."""
        if not self.is_local:
            return io.BufferedReader(_S3File(self), _BUFFER)
        return cast(BinaryIO, pafs.LocalFileSystem().open_input_file(self.uri))

    def stream(self) -> BinaryIO:
        """A file object for reading from start to end; the caller closes it."""
        if not self.is_local:
            return io.BufferedReader(_S3File(self), _STREAM_BUFFER)
        return cast(BinaryIO, pafs.LocalFileSystem().open_input_stream(self.uri, compression=None))

    def names(self) -> list[str]:
        """The sorted names of the files and folders directly in this folder; none if the folder is missing."""
        fs, path = self._file_system()
        return sorted(info.base_name for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)))

    def make_folder(self) -> None:
        """Create this folder and those above it, if they are missing."""
        fs, path = self._file_system()
        fs.create_dir(path, recursive=True)

    def write_folder(self, files: Mapping[str, bytes]) -> None:
        """Replace this folder by one with `files`, which maps names to contents.

        On disk, readers see the old folder or the new one, except for the moment between two renames. On s3, the
        objects are written in their order, and an old object of another name stays. So the last object should hold
        what a reader needs to check the others.
        """
        if self.is_local:
            _write_folder_local(Path(self.uri), files)
        else:
            for name, data in files.items():
                (self / name).write(data)

    # Parquet, and arguments for libraries.

    def parquet(self, names: Sequence[str]) -> pads.Dataset:
        """The parquet files `names` of this folder as one dataset, in their order."""
        fs, path = self._file_system()
        return pads.dataset([f"{path.rstrip('/')}/{name}" for name in names], filesystem=fs, format="parquet")

    def read_parquet(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The table in a parquet file, or only its `columns`. Raises ArrowInvalid if it is no parquet file."""
        with self.open() as file:  # a dataset of one small file would take a third longer, as threads would
            return pq.ParquetFile(file).read(None if columns is None else [*columns], use_threads=False)

    def write_row_groups(self, groups: Iterable[pa.Table], schema: pa.Schema, plain: Collection[str]) -> None:
        """Write tables as the row groups of one parquet file with that schema, atomically.

        Columns in `plain` hold values that are mostly different, so they get no dictionary. The compressed file is held
        in memory.
        """
        sink = pa.BufferOutputStream()
        leaves = [f"{each.name}.list.element" if pa.types.is_list(each.type) else each.name for each in schema]
        with pq.ParquetWriter(
            sink, schema, compression="zstd", use_dictionary=[name for name in leaves if name not in plain]
        ) as writer:
            for table in groups:
                writer.write_table(table)
        self.write(sink.getvalue().to_pybytes())

    def write_parquet(self, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a table as one parquet file, atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=row_group_size)
        self.write(sink.getvalue().to_pybytes())

    def arguments(self, path: str, filesystem: str) -> dict[str, Any]:
        """Keyword arguments for a library that takes a path and a pyarrow file system, such as Ray Data or Ray Train.

        `path` and `filesystem` are the library's names for these arguments. Nothing else needs a file system.
        """
        fs, at = self._file_system()
        return {path: at, filesystem: fs}

    # Conditional writes to an object store, for a lease. On disk, a lease is a file lock instead.

    def read_with_etag(self) -> tuple[bytes, str] | None:
        """A small object of an object store and its ETag, or None if there is none."""
        with _failing_as_os_error(f"Cannot read {self.uri}"):
            try:
                response = _client(self.options).get_object(**_address(self))
                return response["Body"].read(), response["ETag"]
            except ClientError as error:
                if _code(error) in {"NoSuchKey", "404"}:
                    return None
                raise

    def write_if(self, data: bytes, etag: str | None) -> str | None:
        """Write to an object store if the object still has `etag`, or, with None, if there is no object yet.

        Returns the new ETag, or None if the condition does not hold.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with _failing_as_os_error(f"Cannot write {self.uri}"):
            try:
                response = _client(self.options).put_object(**_address(self), Body=data, **condition)
                return cast(str, response["ETag"])
            except ClientError as error:
                if _code(error) in _UNMET:
                    return None
                raise

    def _file_system(self) -> tuple[pafs.FileSystem, str]:
        """pyarrow's file system, and the path on it."""
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        settings: dict[str, Any] = {
            "endpoint_override": self.options.endpoint_url,
            "region": self.options.region,
            "anonymous": self.options.unsigned,
        }
        return pafs.S3FileSystem(**{k: v for k, v in settings.items() if v}), self.uri.removeprefix("s3://")


@dataclass(frozen=True)
class StoredObject:
    """A listed object: its place, its size in bytes, and its ETag if the store has one."""

    place: Place
    bytes: int
    etag: str | None

    @property
    def uri(self) -> str:
        """The URI of its place."""
        return self.place.uri


def places(uris: Sequence[str], options: S3Options) -> list[Place]:
    """The place of each URI, as `Place.at` makes it."""
    return [Place.at(uri, options) for uri in uris]


def settled(config: ConfigT, *names: str) -> ConfigT:
    """The config with absolute URIs in the fields `names` and the environment's options in `s3`.

    Workers on other machines then see the same places. Raises InputError for a URI that is neither local nor on s3.
    """
    values = {name: getattr(config, name) for name in names}
    absolute = {
        name: _normalized(value) if isinstance(value, str) else tuple(map(_normalized, value))
        for name, value in values.items()
    }
    return config.model_copy(update={**absolute, "s3": _resolved(config.s3)})


def _normalized(uri: str) -> str:
    if uri.startswith("s3://"):
        return uri
    if "://" in uri:
        raise InputError(f"{uri!r}: only s3:// URIs and local paths are read.")
    return os.path.abspath(os.path.expanduser(uri))


def _resolved(options: S3Options) -> S3Options:
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return options.model_copy(update={"endpoint_url": endpoint, "region": region})


def _hidden(below: str) -> bool:
    """Whether a path below an input has a hidden folder or name. A `._` file is not hidden, but listed and counted."""
    *folders, name = below.split("/")
    dotted = [part.startswith(".") and part not in {".", ".."} for part in (*folders, name)]
    return any(dotted[:-1]) or (dotted[-1] and not name.startswith("._"))


def _stored_local(place: Place) -> "StoredObject":
    return StoredObject(place, os.path.getsize(place.uri) if os.path.exists(place.uri) else 0, None)


def _list_local(place: Place, enters: Callable[[str], bool] | None, left_out: Counter[str]) -> Iterator["StoredObject"]:
    """Walk a folder. A link to a folder is followed once, unless its target is listed anyway or holds the input."""
    root = os.path.realpath(place.uri)
    followed: set[str] = set()

    def wanted(folder: str, name: str) -> bool:
        path = os.path.join(folder, name)
        if name.startswith("."):
            left_out[HIDDEN] += 1
            return False
        if enters is not None and not enters(path):
            return False
        if os.path.islink(path):
            target = os.path.realpath(path)
            listed = [root, *followed]
            if any(_below(other, target) for other in listed):
                left_out["links to folders that are listed under another name"] += 1
                return False
            if any(_below(target, other) for other in listed):  # the walk would not end
                left_out["links to folders that hold the input"] += 1
                return False
            followed.add(target)
        return True

    def unreadable(error: OSError) -> None:
        left_out[f"folders that cannot be read ({error.strerror})"] += 1

    for folder, folders, names in os.walk(place.uri, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if wanted(folder, name)]
        for name in sorted(names):
            if _hidden(name):
                left_out[HIDDEN] += 1
            else:
                yield _stored_local(place.with_uri(os.path.join(folder, name)))


def _below(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _read_local(path: str, max_bytes: int, span: tuple[int, int] | None) -> bytes:
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise ReadError("read_failed", "Not a regular file.")
        if span:
            with open(path, "rb") as file:
                file.seek(span[0])
                return file.read(span[1])
        size = facts.st_size
        if size > max_bytes:
            raise ReadError("too_large_bytes", f"{size} bytes; the limit is {max_bytes}.")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ReadError("not_found", "The file does not exist.") from error
    except PermissionError as error:
        raise ReadError("access_denied", "This process may not read the file.") from error
    except OSError as error:
        raise ReadError("read_failed", f"Reading failed: {error.strerror}.") from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    yield partial
    partial.replace(target)


def _write_local(target: Path, content: bytes) -> None:
    with _replacing(target) as partial:
        partial.write_bytes(content)


def _write_folder_local(target: Path, files: Mapping[str, bytes]) -> None:
    old, partial = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("old", "tmp"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _client(options: S3Options, attempts: int = 3) -> Any:
    """This process's boto3 client for `options`, safe for threads, with bounded timeouts and standard retries."""
    with _CLIENTS:  # without the lock, threads that start together would make one each
        return _new_client(options, attempts)


@lru_cache(maxsize=8)
def _new_client(options: S3Options, attempts: int) -> Any:
    config = BotoConfig(
        # R2, Ceph and MinIO refuse a write with a checksum that they do not know.
        request_checksum_calculation="when_required",
        connect_timeout=5,
        read_timeout=10,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        signature_version=UNSIGNED if options.unsigned else None,
    )
    session = boto3.session.Session()  # the default session is not safe to share between threads
    client = session.client("s3", endpoint_url=options.endpoint_url, region_name=options.region, config=config)
    if attempts > 1:
        client.meta.events.register("needs-retry.s3", lambda **request: _pause_if_busy(attempts, **request))
    return client


def _pause_if_busy(most: int, response: Any, attempts: int, **_: Any) -> float | None:
    """Seconds until a request is repeated, for codes of other stores than AWS that botocore does not repeat."""
    code = "" if response is None else str(response[1].get("Error", {}).get("Code", ""))
    status = 0 if response is None else response[0].status_code
    if attempts >= most or not (code in _BUSY or status == 429):
        return None
    return float(random.uniform(0.5, 1.0) * _FIRST_PAUSE * 2**attempts)


def _split_s3(uri: str) -> tuple[str, str]:
    """`s3://bucket/a//b` -> (`bucket`, `a//b`)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"{uri!r} names no bucket; write s3://bucket/prefix.")
    return bucket, key


def _paying(options: S3Options) -> dict[str, str]:
    return {"RequestPayer": "requester"} if options.request_payer else {}


def _address(place: Place) -> dict[str, str]:
    bucket, key = _split_s3(place.uri)
    return {"Bucket": bucket, "Key": key, **_paying(place.options)}


@contextmanager
def _listing(place: Place) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise InputError(f"Cannot list {place.uri}: {error}. Check bucket, endpoint and credentials.") from error


def _first_s3(place: Place) -> "StoredObject | None":
    """The first object whose key begins with that of `place`."""
    bucket, prefix = _split_s3(place.uri)
    with _listing(place):
        page = _client(place.options).list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1, **_paying(place.options))
    found = page.get("Contents", ())
    return _stored_s3(place, bucket, found[0]) if found else None


def _stored_s3(place: Place, bucket: str, item: Mapping[str, Any]) -> "StoredObject":
    return StoredObject(place.with_uri(f"s3://{bucket}/{item['Key']}"), int(item["Size"]), item["ETag"])


def _found_s3(place: Place) -> "Place | StoredObject | None":
    _, key = _split_s3(place.uri)
    if place.uri.endswith("/"):
        return place
    folder = place.with_uri(f"{place.uri}/")
    if not key:
        return folder
    first = _first_s3(place)  # the object of this very key comes first
    if first is None:
        return None
    if first.uri == place.uri and first.bytes:
        return first
    if _first_s3(folder):
        return folder
    return first if first.uri == place.uri else place


def _list_s3(place: Place, left_out: Counter[str]) -> Iterator["StoredObject"]:
    bucket, prefix = _split_s3(place.uri)
    pages = _client(place.options).get_paginator("list_objects_v2")
    with _listing(place):
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, **_paying(place.options)):
            for item in page.get("Contents", ()):
                if item["Key"].endswith("/"):
                    continue  # a marker of an empty folder
                if _hidden(_below_prefix(place, f"s3://{bucket}/{item['Key']}")):
                    left_out[HIDDEN] += 1
                else:
                    yield _stored_s3(place, bucket, item)


def _below_prefix(place: Place, uri: str) -> str:
    """The path below a folder. Below a prefix that is no folder, the first name is left out: the user has named it."""
    below = uri.removeprefix(place.uri)
    return below if place.uri.endswith("/") else below.partition("/")[2]


def _folders_s3(place: Place, left_out: Counter[str]) -> list[Place]:
    bucket, prefix = _split_s3(place.uri)
    with _listing(place):
        page = _client(place.options).list_objects_v2(
            Bucket=bucket, Prefix=prefix, Delimiter="/", **_paying(place.options)
        )
    folders = [f"s3://{bucket}/{item['Prefix']}" for item in page.get("CommonPrefixes", ())]
    if page.get("IsTruncated") or page.get("Contents") or len(folders) < 2:
        return [place]
    seen = [folder for folder in folders if not _hidden(_below_prefix(place, folder))]
    left_out[HIDDEN] += len(folders) - len(seen)
    return [place.with_uri(folder) for folder in seen]


class _S3File(io.RawIOBase):
    """An object as a file that can seek. Each read is one request for a range, with the retries of `Place.read`."""

    def __init__(self, place: Place) -> None:
        self._place, self._at = place, 0
        with _failing_as_os_error(f"Cannot read {place.uri}"):
            try:
                facts = _client(place.options).head_object(**_address(place))
            except ClientError as error:
                if _code(error) in _MISSING:
                    raise FileNotFoundError(f"{place.uri} does not exist") from error
                raise
        self._size, self._etag = int(facts["ContentLength"]), str(facts["ETag"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._read(_STREAM_BUFFER), b""))

    def _read(self, size: int) -> bytes:
        size = min(size, self._size - self._at)
        if size <= 0:
            return b""
        try:
            data = _read_s3(self._place, size, self._etag, (self._at, size))
        except ReadError as error:
            kind = FileNotFoundError if error.item_code == "not_found" else OSError
            raise kind(f"Cannot read {self._place.uri}: {error}") from error
        self._at += len(data)
        return data


def _read_s3(place: Place, max_bytes: int, etag: str | None, span: tuple[int, int] | None) -> bytes:
    deadline = time.monotonic() + READ_SECONDS
    for attempt in range(_READ_ATTEMPTS):
        code: ItemCode = "read_failed"
        try:
            return _get(place, max_bytes, etag, span, deadline)
        except ClientError as error:
            if not _transient(error):
                raise _refusal(error) from error
            reason: Exception = error
        except (BotoCoreError, HTTPError) as error:
            reason = error
            if isinstance(error, ReadTimeoutError | ConnectTimeoutError):
                code = "read_timeout"
        pause = random.uniform(0.5, 1.0) * _FIRST_PAUSE * 2**attempt
        if time.monotonic() + pause >= deadline:
            raise ReadError("read_timeout", f"The object did not arrive within {READ_SECONDS:g} s.") from reason
        if attempt + 1 < _READ_ATTEMPTS:
            time.sleep(pause)
    raise ReadError(code, f"Reading failed {_READ_ATTEMPTS} times: {type(reason).__name__}.") from reason


def _get(place: Place, max_bytes: int, etag: str | None, span: tuple[int, int] | None, deadline: float) -> bytes:
    client = _client(place.options, attempts=1)  # one attempt, because the caller retries
    condition = {"IfMatch": etag} if etag else {}
    if span:
        condition["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
    response = client.get_object(**_address(place), **condition)
    body = response["Body"]
    with body as stream:  # the raw stream; `body` checks length and checksum
        if response["ContentLength"] > max_bytes:
            raise ReadError("too_large_bytes", f"{response['ContentLength']} bytes; the limit is {max_bytes}.")
        # A slow sender never causes a socket timeout, so the time for the whole body is limited.
        patience = _BODY_SECONDS + response["ContentLength"] / _SLOWEST
        limit = threading.Timer(max(0.0, min(patience, deadline - time.monotonic())), _cut, [stream])
        limit.start()
        try:
            return cast(bytes, body.read())
        finally:
            limit.cancel()


def _cut(stream: Any) -> None:
    with suppress(RuntimeError, ValueError, OSError):  # the body ended in the meantime
        stream.shutdown()


@contextmanager
def _failing_as_os_error(what: str) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        raise OSError(f"{what}: {error}") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _transient(error: ClientError) -> bool:
    """Whether the same request may succeed a moment later."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status >= 500 or status == 429 or _code(error) in _BUSY


def _refusal(error: ClientError) -> ReadError:
    code = _code(error)
    if code in _MISSING:
        return ReadError("not_found", "The object does not exist.")
    if code in _DENIED:
        return ReadError("access_denied", "The credentials do not allow reading this object.")
    if code in {"PreconditionFailed", "412"}:
        return ReadError("changed", "The object changed after it was listed; run again with a new output.")
    return ReadError("read_failed", f"The store answered {code or 'an error'}.")
