"""Read the encoded images of manifest rows from inputs of any format."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa

from clipflow_ray.config import ImageLimits, InventoryOptions
from clipflow_ray.errors import ItemError
from clipflow_ray.inputs.format import Row, format_named
from clipflow_ray.place import Place

_READ_THREADS: Final = 8
_COLUMNS: Final = ("uri", "member", "input_format", "offset", "bytes", "etag")


def read_row(row: Row, near: Place, options: InventoryOptions, limits: ImageLimits) -> bytes:
    """The encoded image of one manifest row.

    `near` is any place that is reached with the same options as the row's URI. Raises ReadError.
    """
    found = format_named(row["input_format"])
    return found.read(near.with_uri(row["uri"]), row, options, limits.max_bytes)


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

    rows = table.select(_COLUMNS).to_pylist()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read, rows))
