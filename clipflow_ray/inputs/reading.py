"""Read the encoded images of manifest rows from inputs of any format."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, cast

import pyarrow as pa

from clipflow_ray.config import ImageLimits, InventoryOptions
from clipflow_ray.errors import ItemCode, ItemError, NotAnImage, ReadError
from clipflow_ray.inputs.format import NOT_AN_IMAGE, InputFormat, Row, format_named
from clipflow_ray.place import Place
from clipflow_ray.recognise import HEAD, claims_image, kind_in_words, picture_kind

_READ_THREADS: Final = 8
_COLUMNS: Final = ("uri", "member", "input_format", "offset", "bytes", "etag", "problem")
# Older manifests have a column `container` instead of the format's name. `finalize` reads the pictures of their audits.
_FORMAT_OF_CONTAINER: Final = {"": "images", "tar": "webdataset", "parquet": "parquet"}


def read_row(row: Row, near: Place, options: InventoryOptions, limits: ImageLimits) -> bytes:
    """The encoded image of one manifest row.

    `near` is any place that is reached with the same options as the row's URI. Raises ReadError; NotAnImage if the
    object is no image and does not call itself one.
    """
    if row["problem"]:
        code, _, message = row["problem"].partition(": ")
        raise NotAnImage(message) if code == NOT_AN_IMAGE else ReadError(cast(ItemCode, code), message)
    found, place = format_named(row["input_format"]), near.with_uri(row["uri"])
    unknown = found.any_file and not claims_image(row["member"] or row["uri"])
    try:
        data = found.read(place, row, options, limits.max_bytes)
    except ReadError as error:
        if unknown and error.item_code == "too_large_bytes" and _is_other(found, place, row):
            raise NotAnImage("It is no image by its first bytes and its name.") from error
        raise
    if unknown and picture_kind(data[:HEAD]) is None:
        raise NotAnImage(f"It is {kind_in_words(data[:HEAD])}, and its name does not say that it is an image.")
    return data


def read_bytes(
    table: pa.Table, near: Place, limits: ImageLimits, options: InventoryOptions | None = None
) -> list[bytes | ItemError]:
    """The encoded images of manifest rows, in their order, or the error of each one that cannot be read."""
    wanted = options or InventoryOptions()

    def read(row: Row) -> bytes | ItemError:
        try:
            return read_row(row, near, wanted, limits)
        except ItemError as error:
            return error

    def read_all(numbers: Sequence[int]) -> list[bytes | ItemError]:
        return [read(rows[number]) for number in numbers]

    if "container" in table.column_names:
        named = [_FORMAT_OF_CONTAINER[container] for container in table["container"].to_pylist()]
        table = table.append_column("input_format", pa.array(named, pa.string()))
    if "problem" not in table.column_names:  # a manifest of an older version
        table = table.append_column("problem", pa.nulls(len(table), pa.string()))
    rows = table.select(_COLUMNS).to_pylist()
    results: list[bytes | ItemError] = [b""] * len(rows)
    batches = _in_parallel(rows)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for numbers, contents in zip(batches, pool.map(read_all, batches), strict=True):
            for number, content in zip(numbers, contents, strict=True):
                results[number] = content
    return results


def _in_parallel(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of rows that one thread reads. It reads those of a compressed archive from its start to its end."""
    together: dict[object, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        in_order = row["offset"] is not None and format_named(row["input_format"]).in_order
        together[row["uri"] if in_order else number].append(number)
    return [sorted(numbers, key=lambda number: rows[number]["offset"] or 0) for numbers in together.values()]


def _is_other(found: InputFormat, place: Place, row: Row) -> bool:
    """Whether an object that is larger than allowed is no image by its first bytes."""
    if found.in_order or row["member"]:
        return False
    return picture_kind(place.read(HEAD, row["etag"], (0, HEAD))) is None
