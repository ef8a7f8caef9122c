"""Input format `parquet`: tables with encoded images, or with the URIs of images."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError, ReadError
from clipflow_ray.inputs.format import (
    InputFormat,
    Row,
    Source,
    files_ending,
    group_of,
    manifest_row,
    row_id,
    stated,
    value_columns,
)
from clipflow_ray.place import Place, StoredObject

_SUFFIX: Final = ".parquet"
_LOCK: Final = threading.Lock()


class Parquet(InputFormat):
    """Parquet files. A row of the manifest names an image by its row number, which is its `offset`.

    If the file has no image bytes, it is a list of URIs: `offset` is null and the object at the URI is read.
    """

    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.uri.lower().endswith(_SUFFIX)

    def sources(self, place: Place) -> Sequence[Source]:
        return files_ending(self.name, place, _SUFFIX)

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        uri = source.place.uri
        group = group_of(source.base, uri, options.group_depth)
        try:
            with source.place.open() as file:
                parquet = pq.ParquetFile(file)
                names = parquet.schema_arrow.names
                has_images = image_column(parquet.schema_arrow, options.bytes_column) is not None
                if not has_images and options.uri_column not in names:
                    raise InputError(
                        f"{uri} has neither image bytes nor a column {options.uri_column!r}; it has "
                        f"{', '.join(names)}. Set --bytes-column or --uri-column."
                    )
                wanted = [c for c in (*value_columns(options).values(), options.uri_column) if c in names]
                records = (record for batch in _batches(parquet, wanted) for record in batch)
                for number, record in enumerate(records):
                    if has_images:
                        row = manifest_row(source, uri, group, str(number), offset=number, etag=source.etag)
                    else:
                        listed = str(record.get(options.uri_column) or "")
                        row = manifest_row(source, listed, group, identity=row_id(listed, f"{uri}:{number}"))
                    yield row | stated(record, options)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{uri} does not read as parquet: {error}.") from error

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        """The image in one row of the file. Its row group stays in memory for the rows beside it.

        Raises ReadError with not_found, read_failed, empty or too_large_bytes.
        """
        if row["offset"] is None:
            return super().read(place, row, options, max_bytes)
        number = row["offset"]
        try:
            starts = _row_groups(place)
            group = int(np.searchsorted(starts, number, side="right")) - 1
            with _LOCK:  # threads ask for neighbours at the same time; only one of them should read the row group
                value = _images(place, group, options.bytes_column)[number - int(starts[group])]
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


def image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column with encoded images: `wanted`, or the first one of type bytes or `{bytes, path}`; else None."""
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if binary and wanted in (None, field.name):
            return str(field.name)
    return None


def _batches(parquet: pq.ParquetFile, columns: Sequence[str]) -> Iterable[list[dict[str, Any]]]:
    if columns:
        return (batch.to_pylist() for batch in parquet.iter_batches(columns=columns))
    return ([{}] * parquet.metadata.row_group(at).num_rows for at in range(parquet.metadata.num_row_groups))


@lru_cache(maxsize=64)
def _row_groups(place: Place) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Number of the first row of each row group."""
    with place.open() as file:
        metadata = pq.read_metadata(file)
    counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)


@lru_cache(maxsize=2)
def _images(place: Place, group: int, column: str | None) -> pa.ChunkedArray:
    """The encoded images of one row group."""
    with place.open() as file:
        parquet = pq.ParquetFile(file)
        name = image_column(parquet.schema_arrow, column)
        if name is None:
            raise ReadError("read_failed", "The parquet file no longer has image bytes.")
        values = parquet.read_row_group(group, columns=[name])[name]
    if pa.types.is_struct(values.type):
        values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks])
    return values
