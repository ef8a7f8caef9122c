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
# Older manifests have a column `container` instead of the format's name. `finalize` reads the pictures of their audits.
_FORMAT_OF_CONTAINER: Final = {"": "images", "tar": "webdataset", "parquet": "parquet"}


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

    if "container" in table.column_names:
        named = [_FORMAT_OF_CONTAINER[container] for container in table["container"].to_pylist()]
        table = table.append_column("input_format", pa.array(named, pa.string()))
    rows = table.select(_COLUMNS).to_pylist()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read, rows))
