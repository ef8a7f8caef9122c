"""Ray Data tasks that read and decode: manifest rows in, described rows with a view out.

Batches are Arrow tables. A row that cannot be read or decoded keeps its place with status `error`; its view is null.
Nothing here imports torch: a task's process would spend seconds on it before its first image.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import pyarrow as pa

from clipflow_ray import images
from clipflow_ray.config import ImageLimits, S3Options
from clipflow_ray.errors import ItemError
from clipflow_ray.images import DecodedImage, ViewKind
from clipflow_ray.storage import ObjectReader

VIEW: Final = "view"
_READ_THREADS: Final = 8


@dataclass(frozen=True)
class ReadImage:
    """One object after reading and decoding: its bytes' digest, and an image or the reason why not."""

    sha256: str | None
    bytes: int | None
    image: DecodedImage | ItemError


def read_images(table: pa.Table, s3: S3Options, limits: ImageLimits) -> list[ReadImage]:
    """Read and decode the objects of manifest rows, in their order; reads overlap, decoding uses one core."""
    reader = _reader(s3)

    def read(uri: str, etag: str | None) -> bytes | ItemError:
        try:
            return reader.read(uri, limits.max_bytes, etag)
        except ItemError as error:
            return error

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        contents = pool.map(read, table["uri"].to_pylist(), table["etag"].to_pylist())
        return [_decoded(content, limits) for content in contents]


def described(table: pa.Table, outcomes: Sequence[ReadImage]) -> pa.Table:
    """Manifest rows plus what reading and decoding told: the ledger's columns from sha256 to error_message."""
    decoded = [o.image if isinstance(o.image, DecodedImage) else None for o in outcomes]
    errors = [o.image if isinstance(o.image, ItemError) else None for o in outcomes]
    size = pa.array([o.bytes for o in outcomes], pa.int64())
    table = table.drop_columns(["bytes", "etag"])
    for name, values, kind in (
        ("sha256", [o.sha256 for o in outcomes], pa.string()),
        ("bytes", size, pa.int64()),
        ("width", [i and i.width for i in decoded], pa.int32()),
        ("height", [i and i.height for i in decoded], pa.int32()),
        ("format", [i and i.format for i in decoded], pa.string()),
        ("mode", [i and i.mode for i in decoded], pa.string()),
        ("frames", [i and i.frames for i in decoded], pa.int32()),
        ("jpeg_quality", [i and i.jpeg_quality for i in decoded], pa.int32()),
        ("has_exif", [i.has_exif if i else None for i in decoded], pa.bool_()),
        ("stratum", [i and images.stratum(i.format, i.width, i.height) for i in decoded], pa.string()),
        ("status", ["error" if e else "ok" for e in errors], pa.string()),
        ("error_code", [e and e.item_code for e in errors], pa.string()),
        ("error_message", [e and str(e) for e in errors], pa.string()),
    ):
        table = table.append_column(name, pa.array(values, kind))
    return table


def read_and_decode(
    table: pa.Table,
    s3: S3Options,
    limits: ImageLimits,
    kind: ViewKind,
) -> pa.Table:
    """Manifest rows -> described rows with the encoder's view as bytes (uint8 224 x 224 x 3), null on error."""
    outcomes = read_images(table, s3, limits)
    views = [images.view(o.image.rgb, kind).tobytes() if isinstance(o.image, DecodedImage) else None for o in outcomes]
    return described(table, outcomes).append_column(VIEW, pa.array(views, pa.large_binary()))


@lru_cache(maxsize=4)
def _reader(s3: S3Options) -> ObjectReader:
    return ObjectReader(s3)


def _decoded(content: bytes | ItemError, limits: ImageLimits) -> ReadImage:
    if isinstance(content, ItemError):
        return ReadImage(None, None, content)
    digest, size = hashlib.sha256(content).hexdigest(), len(content)
    try:
        image = images.decode(content, limits)
    except ItemError as error:
        return ReadImage(digest, size, error)
    return ReadImage(digest, size, image)
