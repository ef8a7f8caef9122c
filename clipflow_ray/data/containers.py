"""Images inside other files: which column of a parquet file holds them, and one image by its row number."""

import threading
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.errors import ReadError
from clipflow_ray.place import Place

TAR: Final = "tar"
PARQUET: Final = "parquet"
_LOCK: Final = threading.Lock()


def image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column with encoded images: `wanted`, or the first with bytes or `{bytes, path}`; None where none is."""
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if binary and wanted in (None, field.name):
            return str(field.name)
    return None


def parquet_value(place: Place, row: int, max_bytes: int, column: str | None) -> bytes:
    """The encoded image in one row of a parquet file; its row group stays in memory for the neighbours.

    Raises ReadError with not_found, read_failed, empty or too_large_bytes.
    """
    try:
        starts = _row_groups(place)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        with _LOCK:  # neighbours ask at once, and one of them should read
            value = _images(place, group, column)[row - int(starts[group])]
    except FileNotFoundError as error:
        raise ReadError("not_found", "The parquet file is not there.") from error
    except (pa.ArrowInvalid, OSError, IndexError) as error:
        raise ReadError("read_failed", "The parquet file does not read; it may have changed.") from error
    if not value.is_valid:
        raise ReadError("empty", "The row has no image bytes.")
    buffer = value.as_buffer()
    if buffer.size > max_bytes:
        raise ReadError("too_large_bytes", f"{buffer.size} bytes; the limit is {max_bytes}.")
    return bytes(buffer)


@lru_cache(maxsize=64)
def _row_groups(place: Place) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Number of the first row of each row group."""
    with place.open() as file:
        metadata = pq.read_metadata(file)
    counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)


@lru_cache(maxsize=2)
def _images(place: Place, group: int, column: str | None) -> pa.ChunkedArray:
    with place.open() as file:
        parquet = pq.ParquetFile(file)
        name = image_column(parquet.schema_arrow, column)
        if name is None:
            raise ReadError("read_failed", "The parquet file no longer has image bytes.")
        values = parquet.read_row_group(group, columns=[name])[name]
    if pa.types.is_struct(values.type):
        values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks])
    return values
