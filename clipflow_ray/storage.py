"""Objects on `s3://` and on local disk: list, read, write whole. Credentials never pass through here by value.

Image objects go through boto3 (any key, typed refusals); parquet goes through pyarrow's filesystems,
which is what Ray Data speaks. URIs stay `str`: a `Path` would eat the second slash of `s3://`.
"""

import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import boto3
import pyarrow.fs as pafs
from botocore import UNSIGNED
from botocore.config import Config as BotoConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    HTTPClientError,
    ReadTimeoutError,
)
from urllib3.exceptions import HTTPError

from clipflow_ray.config import S3Options
from clipflow_ray.errors import InputError, ItemCode, ReadError

READ_SECONDS: Final = 30.0
_READ_ATTEMPTS: Final = 5
_FIRST_PAUSE: Final = 0.1
_BODY_SECONDS: Final = 5.0
_SLOWEST: Final = 1e6  # bytes a second
_DENIED: Final = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_BUSY: Final = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_MISSING: Final = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}


@dataclass(frozen=True)
class StoredObject:
    """A listed object: its URI, size in bytes, and ETag where the store has one."""

    uri: str
    bytes: int
    etag: str | None


def is_s3(uri: str) -> bool:
    """Whether `uri` names an object store rather than a local path."""
    return uri.startswith("s3://")


def normalized(uri: str) -> str:
    """An absolute local path, or the s3 URI as it is; raises InputError for any other scheme."""
    if is_s3(uri):
        return uri
    if "://" in uri:
        raise InputError(f"{uri!r}: only s3:// URIs and local paths are read.")
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """Child of a folder or prefix."""
    return "/".join([uri.rstrip("/"), *parts])


def resolved(options: S3Options) -> S3Options:
    """The options with this process's environment filled in, so that workers elsewhere see the same endpoint."""
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return options.model_copy(update={"endpoint_url": endpoint, "region": region})


def list_objects(uri: str, s3: S3Options, required: bool = True) -> Iterator[StoredObject]:
    """Every object under a folder, a prefix, or the one object that `uri` names; sorted within a folder.

    Hidden names (leading dot) and empty folder markers are left out. Raises InputError when it may
    not be listed or, where something is `required`, nothing is there.
    """
    found = False
    for item in _list_s3(uri, s3) if is_s3(uri) else _list_local(uri):
        if not _hidden(item.uri.removeprefix(uri)) and not item.uri.endswith("/"):
            found = True
            yield item
    if required and not found:
        raise InputError(f"{uri} holds no objects: check the path, or the prefix and its bucket.")


def folders_of(uri: str, s3: S3Options) -> list[str]:
    """The first folders under an s3 prefix, to be listed apart; the prefix itself where objects lie between them."""
    bucket, prefix = split_s3(uri)
    try:
        page = s3_client(s3).list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/")
    except (ClientError, BotoCoreError, HTTPClientError) as error:
        raise InputError(f"Cannot list {uri}: {error}. Check bucket, endpoint and credentials.") from error
    folders = [f"s3://{bucket}/{item['Prefix']}" for item in page.get("CommonPrefixes", ())]
    whole = page.get("IsTruncated") or page.get("Contents") or len(folders) < 2
    return [uri] if whole else [folder for folder in folders if not _hidden(folder.removeprefix(uri))]


def _hidden(below: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in below.split("/"))


class ObjectReader:
    """Reads whole objects; one per process, safe for threads. boto3's client is made when first needed."""

    def __init__(self, s3: S3Options) -> None:
        self._s3 = s3
        self._client: Any = None
        self._lock = threading.Lock()

    def read(self, uri: str, max_bytes: int, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
        """The object's bytes, or those of `span` (offset, size).

        Raises ReadError with bad_uri, not_found, access_denied, read_timeout, read_failed or too_large_bytes, and where
        it has another ETag than `etag`, with changed. Faults, in mid-body too, and bodies that differ from the
        checksum that the store sends along are retried: five attempts within 30 seconds.
        """
        if "\0" in uri or ".." in uri.split("/") or not (is_s3(uri) or uri.startswith("/")):
            raise ReadError("bad_uri", "Only s3:// URIs and local paths without `..` are read.")
        if span and span[1] > max_bytes:
            raise ReadError("too_large_bytes", f"{span[1]} bytes; the limit is {max_bytes}.")
        if not is_s3(uri):
            return _read_local(uri, max_bytes, span)
        deadline = time.monotonic() + READ_SECONDS
        for attempt in range(_READ_ATTEMPTS):
            code: ItemCode = "read_failed"
            try:
                return self._get(uri, max_bytes, etag, span, deadline)
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
                raise ReadError("read_timeout", f"The object did not come within {READ_SECONDS:g} s.") from reason
            if attempt + 1 < _READ_ATTEMPTS:
                time.sleep(pause)
        raise ReadError(code, f"Reading failed {_READ_ATTEMPTS} times: {type(reason).__name__}.") from reason

    def _get(self, uri: str, max_bytes: int, etag: str | None, span: tuple[int, int] | None, deadline: float) -> bytes:
        with self._lock:
            if self._client is None:
                self._client = s3_client(self._s3, attempts=1)  # `read` retries, so that attempts do not multiply
        bucket, key = split_s3(uri)
        condition = {"IfMatch": etag} if etag else {}
        if span:
            condition["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
        response = self._client.get_object(Bucket=bucket, Key=key, **condition)
        body = response["Body"]
        with body as stream:  # the stream below `body`, which checks length and checksum
            if response["ContentLength"] > max_bytes:
                raise ReadError("too_large_bytes", f"{response['ContentLength']} bytes; the limit is {max_bytes}.")
            # A sender that dribbles never hits a socket timeout, so the time of the whole body is limited.
            patience = _BODY_SECONDS + response["ContentLength"] / _SLOWEST
            limit = threading.Timer(max(0.0, min(patience, deadline - time.monotonic())), _cut, [stream])
            limit.start()
            try:
                return cast(bytes, body.read())
            finally:
                limit.cancel()


def _cut(stream: Any) -> None:
    with suppress(RuntimeError, ValueError, OSError):  # it ended meanwhile
        stream.shutdown()


def s3_client(options: S3Options, attempts: int = 3) -> Any:
    """A boto3 client with bounded timeouts and standard retries; credentials from boto3's own chain."""
    config = BotoConfig(
        connect_timeout=5,
        read_timeout=10,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        signature_version=UNSIGNED if options.unsigned else None,
    )
    session = boto3.session.Session()  # the default session is not safe to share between threads
    return session.client("s3", endpoint_url=options.endpoint_url, region_name=options.region, config=config)


def split_s3(uri: str) -> tuple[str, str]:
    """`s3://bucket/a//b` -> (`bucket`, `a//b`)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"{uri!r} names no bucket; write s3://bucket/prefix.")
    return bucket, key


def filesystem(uri: str, options: S3Options) -> tuple[pafs.FileSystem, str]:
    """pyarrow's filesystem for `uri`, and the path on it."""
    if not is_s3(uri):
        return pafs.LocalFileSystem(), uri
    settings: dict[str, Any] = {
        "endpoint_override": options.endpoint_url,
        "region": options.region,
        "anonymous": options.unsigned,
    }
    return pafs.S3FileSystem(**{k: v for k, v in settings.items() if v}), uri.removeprefix("s3://")


def exists(uri: str, options: S3Options) -> bool:
    """Whether an object (not a folder) is there."""
    fs, path = filesystem(uri, options)
    return bool(fs.get_file_info(path).type == pafs.FileType.File)


def read_text(uri: str, options: S3Options) -> str:
    """A small UTF-8 object; raises FileNotFoundError."""
    fs, path = filesystem(uri, options)
    with fs.open_input_stream(path) as stream:
        return cast(bytes, stream.read()).decode()


def write_text(uri: str, text: str, options: S3Options) -> None:
    """Write a small UTF-8 object whole: readers see the old one or the new one."""
    fs, path = filesystem(uri, options)
    if is_s3(uri):
        with fs.open_output_stream(path) as stream:  # S3 shows an object when its upload completes
            stream.write(text.encode())
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _list_s3(uri: str, options: S3Options) -> Iterator[StoredObject]:
    bucket, prefix = split_s3(uri)
    try:
        pages = s3_client(options).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", ()):
                yield StoredObject(f"s3://{bucket}/{item['Key']}", int(item["Size"]), item["ETag"])
    except (ClientError, BotoCoreError, HTTPClientError) as error:
        raise InputError(f"Cannot list {uri}: {error}. Check bucket, endpoint and credentials.") from error


def _list_local(uri: str) -> Iterator[StoredObject]:
    if os.path.isfile(uri):
        yield StoredObject(uri, os.path.getsize(uri), None)
    for folder, folders, names in os.walk(uri):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = f"{folder}/{name}"
            yield StoredObject(path, os.path.getsize(path) if os.path.exists(path) else 0, None)


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
        raise ReadError("not_found", "The file is not there.") from error
    except PermissionError as error:
        raise ReadError("access_denied", "The file may not be read.") from error
    except OSError as error:
        raise ReadError("read_failed", f"Reading failed: {error.strerror}.") from error


def _transient(error: ClientError) -> bool:
    """Whether the store may answer the same request otherwise in a moment."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status >= 500 or status == 429 or error.response.get("Error", {}).get("Code") in _BUSY


def _refusal(error: ClientError) -> ReadError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in _MISSING:
        return ReadError("not_found", "The object is not there.")
    if code in _DENIED:
        return ReadError("access_denied", "The credentials at hand may not read this object.")
    if code in {"PreconditionFailed", "412"}:
        return ReadError("changed", "The object changed after it was listed; run again on a new output.")
    return ReadError("read_failed", f"The store answered {code or 'an error'}.")
