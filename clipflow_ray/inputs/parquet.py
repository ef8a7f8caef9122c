"""Input format `parquet`: tables with encoded images, or with the URIs of images."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError, ReadError
from clipflow_ray.inputs.format import (
    HoldsNoImagesError,
    InputFormat,
    Row,
    Source,
    columns_found,
    group_of,
    manifest_row,
    resolved,
    row_id,
    stated,
    unlisted,
)
from clipflow_ray.inputs.lists import SET_URI_COLUMN, Record, listed_rows
from clipflow_ray.place import Place
from clipflow_ray.recognise import HEAD, is_base64_picture, picture_kind

_LOCK: Final = threading.Lock()
_UNREADABLE: Final = (pa.ArrowException, OSError)
_TRIED: Final = 16  # rows that are looked at to find the column with images
_BATCH: Final = 64  # rows; pyarrow refuses nested columns of 2 GiB in one piece
_INDEX: Final = re.compile(r"\d+/(\d+)")  # a member that is one image of the list in its row


@dataclass(frozen=True)
class ImageColumn:
    """Where a table holds encoded images: the names of the column and of the fields in it, down to the image.

    `described`: the image is `{bytes, path}`, not bytes alone. `repeated`: the column holds a list of images a row.
    """

    path: tuple[str, ...]
    described: bool
    repeated: bool

    @property
    def name(self) -> str:
        """The name in words, such as `sample.image`."""
        return ".".join(self.path)


class Parquet(InputFormat):
    """Parquet files. A row of the manifest names an image by its row number, which is its `offset`.

    If the file has no image bytes, it is a list of URIs: `offset` is null and the object at the URI is read.
    """

    suffixes = (".parquet", ".parq", ".pq")

    def matches(self, head: bytes, compression: str | None) -> bool:
        return compression is None and head.startswith(b"PAR1")

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row]:
        uri = source.place.uri
        try:
            with source.place.open() as file:
                parquet = pq.ParquetFile(file)
                column = image_column(parquet, options.bytes_column, uri)
                if column is not None:
                    yield from _image_rows(source, parquet, column, options)
                    return
                names = parquet.schema_arrow.names
                if not any(name.strip().casefold() == options.uri_column.casefold() for name in names):
                    raise HoldsNoImagesError(
                        f"{uri} has neither image bytes nor a column {options.uri_column!r}; it has "
                        f"{', '.join(names)}.{_in_base64(parquet)} Set --bytes-column or --uri-column."
                    )
                if parquet.metadata.num_rows == 0:
                    left_out["tables without rows"] += 1
                    return
                yield from listed_rows(source, _records(parquet, options, uri, SET_URI_COLUMN), options)
        except _UNREADABLE as error:
            yield unlisted(source, options, f"does not read as parquet: {error}")

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        """The image in one row of the file. Its row group stays in memory for the rows beside it.

        If the row holds a path instead of bytes, the file at that path is read; a relative path starts at the folder
        of the table. Raises ReadError with not_found, read_failed, empty or too_large_bytes.
        """
        if row["offset"] is None:
            return super().read(place, row, options, max_bytes)
        number = row["offset"]
        try:
            starts = _row_groups(place)
            group = int(np.searchsorted(starts, number, side="right")) - 1
            with _LOCK:  # threads ask for neighbours at the same time; only one of them should read the row group
                column = _column(place, options.bytes_column)
                value = _images(place, group, column)[number - int(starts[group])]
        except FileNotFoundError as error:
            raise ReadError("not_found", "The parquet file is not there.") from error
        except InputError as error:
            raise ReadError("read_failed", f"The parquet file has changed: {error}") from error
        except (*_UNREADABLE, IndexError) as error:
            raise ReadError("read_failed", f"The row group does not read; the file is damaged: {error}") from error
        data, path = _image(value, column, row["member"])
        if data is not None:
            if data.size > max_bytes:
                raise ReadError("too_large_bytes", f"{data.size} bytes; the limit is {max_bytes}.")
            return bytes(data)
        if path:
            return place.with_uri(resolved(place.uri.rpartition("/")[0] + "/", path)).read(max_bytes)
        raise ReadError("empty", "The row has no image bytes.")


def image_column(parquet: pq.ParquetFile, wanted: str | None, uri: str) -> ImageColumn | None:
    """The column with images: `wanted`, or the first one of `{bytes, path}`, or the first whose bytes are images.

    If no bytes show what they are, the first column of bytes. None if there is no such column. Raises InputError if
    `wanted` is not there or holds no bytes.
    """
    found = [column for field in parquet.schema_arrow for column in _candidates(field.type, (field.name,))]
    if wanted is not None:
        mine = [column for column in found if wanted in (column.name, column.path[0])]
        if not mine:
            names = ", ".join(parquet.schema_arrow.names)
            raise InputError(f"{uri} has no column {wanted!r} with image bytes; it has {names}. Set --bytes-column.")
        found = mine
    described = [column for column in found if column.described]
    if described or len(found) < 2:
        return next(iter(described or found), None)
    return next((column for column in found if _holds_images(parquet, column)), found[0])


def table_records(place: Place, options: InventoryOptions, advice: str = SET_URI_COLUMN) -> Iterator[Record]:
    """The records of a parquet file that is a list; see `lists.records`."""
    try:
        with place.open() as file:
            yield from _records(pq.ParquetFile(file), options, place.uri, advice)
    except _UNREADABLE as error:
        raise InputError(f"{place.uri} does not read as parquet: {error}") from error


def _candidates(kind: pa.DataType, path: tuple[str, ...], repeated: bool = False) -> list[ImageColumn]:
    """The columns that may hold images in a column of type `kind`, with at most one list on the way."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_binary(kind):
        return [ImageColumn(path, False, repeated)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [] if repeated else _candidates(kind.value_type, path, True)
    if not pa.types.is_struct(kind):
        return []
    names = {field.name: field.type for field in kind}
    if "bytes" in names and (_is_binary(names["bytes"]) or pa.types.is_null(names["bytes"])):
        return [ImageColumn(path, True, repeated)]
    return [column for name, each in names.items() for column in _candidates(each, (*path, name), repeated)]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _holds_images(parquet: pq.ParquetFile, column: ImageColumn) -> bool:
    """Whether the first bytes in the column are those of images."""
    for batch in parquet.iter_batches(_TRIED, columns=[column.path[0]]):
        for value in batch[0]:
            for index in range(_length(value, column)):
                data, _ = _image(value, column, f"0/{index}")
                if data is not None and data.size:
                    return picture_kind(bytes(data[:HEAD])) is not None
    return False


def _length(value: pa.Scalar, column: ImageColumn) -> int:
    """The number of images in a row; a row without an image counts as one, so that it is not lost."""
    if not column.repeated:
        return 1
    for name in column.path[1:]:
        if isinstance(value, pa.ListScalar) or not value.is_valid:
            break
        value = value[name]
    return max(1, len(value.values)) if value.is_valid and value.values is not None else 1


def _image(value: pa.Scalar, column: ImageColumn, member: str) -> tuple[pa.Buffer | None, str | None]:
    """The bytes and the path in one value of the column; of a list, those of the image that `member` names."""
    found = _INDEX.match(member)
    steps = list(column.path[1:])
    while value.is_valid:
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        elif isinstance(value, pa.ListScalar):
            index = int(found[1]) if found else 0
            if index >= len(value.values):
                return None, None
            value = value.values[index]
        elif steps:
            value = value[steps.pop(0)]
        elif isinstance(value, pa.StructScalar):
            fields = value.keys()
            data = value["bytes"]
            path = value["path"].as_py() if "path" in fields else None
            return (data.as_buffer() if data.is_valid else None), path
        else:
            return value.as_buffer(), None
    return None, None


def _image_rows(
    source: Source, parquet: pq.ParquetFile, column: ImageColumn, options: InventoryOptions
) -> Iterator[Row]:
    """A row for each image. A row group whose other columns do not read keeps its rows, without their labels."""
    uri = source.place.uri
    group = group_of(source.base, uri, options.group_depth)
    names = parquet.schema_arrow.names
    found = columns_found(names, options, uri)
    classes = _class_names(parquet.schema_arrow)
    shape = _leaf_of_paths(parquet, column)
    number = 0
    for at in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(at).num_rows
        try:
            facts = _facts(parquet, at, count, column, shape, found, classes)
        except _UNREADABLE:
            facts = [({}, [None])] * count
        for values, paths in facts:
            for index, path in enumerate(paths):
                name = f"{number}/{index}" if column.repeated else str(number)
                shown = f"{name}:{path}" if path else name
                row = manifest_row(source, uri, group, shown, row_id(uri, name), offset=number, etag=source.etag)
                yield row | stated(values, options)
            number += 1


def _facts(
    parquet: pq.ParquetFile,
    at: int,
    count: int,
    column: ImageColumn,
    shape: str | None,
    found: dict[str, str],
    classes: dict[str, Sequence[str]],
) -> list[tuple[dict[str, Any], list[str | None]]]:
    """(values of the user's columns, path of each image or None) of the rows of one row group."""
    wanted = list(dict.fromkeys([*found.values(), *([shape] if shape else [])]))
    if not wanted:
        return [({}, [None])] * count
    facts: list[tuple[dict[str, Any], list[str | None]]] = []
    for batch in parquet.iter_batches(_BATCH * 16 if shape != column.path[0] else _BATCH, [at], wanted):
        images: Sequence[Any] = batch.column(column.path[0]) if shape else [None] * len(batch)
        own = list(dict.fromkeys(found.values()))
        records = batch.select(own).to_pylist() if own else [{}] * len(batch)
        for record, value in zip(records, images, strict=True):
            values = {ours: _named(record[theirs], classes.get(theirs)) for ours, theirs in found.items()}
            paths: list[str | None] = [None]
            if value is not None:
                paths = [_path(value, column, index) for index in range(_length(value, column))]
            facts.append((values, paths))
    return facts


def _path(value: pa.Scalar, column: ImageColumn, index: int) -> str | None:
    """The path that the table gives for an image, if the part of the value that was read has it."""
    steps = list(column.path[1:])
    while value.is_valid:
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        elif isinstance(value, pa.ListScalar):
            if index >= len(value.values):
                return None
            value = value.values[index]
        elif steps:
            value = value[steps.pop(0)]
        else:
            found: Any = value.as_py()
            path = found.get("path") if isinstance(found, dict) else None
            return str(path) if path else None
    return None


def _leaf_of_paths(parquet: pq.ParquetFile, column: ImageColumn) -> str | None:
    """The part of the image column to read for its listing: the paths, which are small, or all of a list of bytes."""
    leaves: list[str] = [parquet.schema.column(at).path for at in range(len(parquet.schema))]
    own = [leaf for leaf in leaves if leaf == column.path[0] or leaf.startswith(f"{column.path[0]}.")]
    if column.described and (paths := [leaf for leaf in own if leaf.endswith(".path")]):
        prefix = ".".join(column.path) + "."
        return next((leaf for leaf in paths if leaf.startswith(prefix)), paths[0])
    return column.path[0] if column.repeated else None


def _records(parquet: pq.ParquetFile, options: InventoryOptions, where: str, advice: str) -> Iterator[Record]:
    found = columns_found(parquet.schema_arrow.names, options, where, {options.uri_column: advice})
    classes = _class_names(parquet.schema_arrow)
    for batch in parquet.iter_batches(columns=list(dict.fromkeys(found.values()))):
        for record in batch.to_pylist():
            yield Record({ours: _named(record[theirs], classes.get(theirs)) for ours, theirs in found.items()})


def _class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Column -> names of its classes, as `datasets` writes them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):  # metadata of another kind
        return {}


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1 is no class


def _in_base64(parquet: pq.ParquetFile) -> str:
    """A sentence that names the columns with images in base64; empty if there are none."""
    texts = [field.name for field in parquet.schema_arrow if _is_text(field.type)]
    if not texts or not parquet.metadata.num_rows:
        return ""
    (first, *_) = next(parquet.iter_batches(1, columns=texts)).to_pylist()
    found = [name for name in texts if is_base64_picture(first[name] or "")]
    return f" Base64 text is not read: decode {', '.join(found)} to a column of bytes." if found else ""


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


@lru_cache(maxsize=64)
def _row_groups(place: Place) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Number of the first row of each row group."""
    with place.open() as file:
        metadata = pq.read_metadata(file)
    counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)


@lru_cache(maxsize=64)
def _column(place: Place, wanted: str | None) -> ImageColumn:
    with place.open() as file:
        column = image_column(pq.ParquetFile(file), wanted, place.uri)
    if column is None:
        raise InputError("it no longer has image bytes.")
    return column


@lru_cache(maxsize=2)
def _images(place: Place, group: int, column: ImageColumn) -> pa.ChunkedArray:
    """The image column in one row group."""
    with place.open() as file:
        batches = list(pq.ParquetFile(file).iter_batches(_BATCH, [group], [column.path[0]]))
    return pa.chunked_array([batch.column(0) for batch in batches])
