"""Inputs (folders and `s3://` prefixes) -> a manifest: parquet files with one row per object."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector

from clipflow_ray.config import S3Options
from clipflow_ray.errors import InputError
from clipflow_ray.storage import StoredObject, filesystem, is_s3, join, list_objects, normalized

MANIFEST_SCHEMA: Final = pa.schema(
    [
        ("row_id", pa.string()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("group", pa.string()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
    ]
)
_ROWS_PER_FILE: Final = 100_000


def row_id(uri: str, member: str = "") -> str:
    """32 hex digits of the object's identity: the checkpoint key, the same in every run."""
    return hashlib.blake2b(f"{uri}\0{member}".encode(errors="surrogateescape"), digest_size=16).hexdigest()


def listing_hash(inputs: Sequence[str], s3: S3Options) -> str:
    """16 hex digits over what `inputs` hold now: ids, sizes and ETags."""
    digest = hashlib.sha256()
    for row in _rows(inputs, s3):
        digest.update(f"{row['row_id']} {row['bytes']} {row['etag']}\n".encode())
    return digest.hexdigest()[:16]


def write_manifest(inputs: Sequence[str], folder: str, s3: S3Options) -> int:
    """List `inputs` into parquet files under `folder`; returns the row count.

    An object that two inputs name is listed once. `group` is the first folder below the input, or the input's own
    name. Raises InputError when an input holds nothing or holds `folder` itself.
    """
    folder = normalized(folder)
    for uri in map(normalized, inputs):
        if join(folder, "").startswith(uri if is_s3(uri) else join(uri, "")):
            raise InputError(f"The output lies inside the input {uri}; write it elsewhere.")
    fs, path = filesystem(folder, s3)
    fs.create_dir(path, recursive=True)
    rows = _rows(inputs, s3)
    count = 0
    parts: set[str] = set()
    while chunk := list(islice(rows, _ROWS_PER_FILE)):
        name = f"part-{len(parts):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(chunk, MANIFEST_SCHEMA), join(path, name), filesystem=fs)
        parts.add(name)
        count += len(chunk)
    for left in fs.get_file_info(FileSelector(path)):  # by a listing that was cut off when the input held more
        if left.base_name.startswith("part-") and left.base_name not in parts:
            fs.delete_file(left.path)
    return count


def _rows(inputs: Sequence[str], s3: S3Options) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for uri in map(normalized, inputs):
        for item in list_objects(uri, s3):
            try:
                item.uri.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{item.uri!a} is not a UTF-8 name: rename it.") from error
            identity = row_id(item.uri)
            if identity not in seen:
                seen.add(identity)
                yield {
                    "row_id": identity,
                    "uri": item.uri,
                    "member": "",
                    "group": _group(uri, item),
                    "bytes": item.bytes,
                    "etag": item.etag,
                }


def _group(prefix: str, item: StoredObject) -> str:
    folders = item.uri.removeprefix(prefix).lstrip("/").split("/")[:-1]
    return folders[0] if folders else prefix.rstrip("/").rsplit("/", 1)[-1]
