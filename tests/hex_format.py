"""An input format that only tests have: text files, each with one encoded image in hex digits."""

from collections.abc import Iterator

from clipflow_ray.config import InventoryOptions
from clipflow_ray.inputs.format import InputFormat, Row, Source, file_row
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place, StoredObject

LINE = {"hex": "tests.hex_format:Hex"}  # what a new format adds to the registry


class Hex(InputFormat):
    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.uri.endswith(".hex")

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        return (file_row(source, item, options) | {"label": "toy"} for item in source.place.objects())

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        return bytes.fromhex(place.read(2 * max_bytes, row["etag"]).decode())


def register() -> None:
    """For processes of their own: a Ray worker imports the registry anew."""
    FORMATS.update(LINE)
