"""An input format that only tests have: text files with one encoded image a line, in hex digits."""

from collections.abc import Iterator

from clipflow_ray.config import InventoryOptions
from clipflow_ray.inputs.format import InputFormat, Row, Source, manifest_row
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place, StoredObject

LINE = {"hex": "tests.hex_format:Hex"}  # what a new format adds to the registry


class Hex(InputFormat):
    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.uri.endswith(".hex")

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        for item in source.place.objects():
            for number in range(len(item.place.read_text().splitlines())):
                yield manifest_row(source, item.uri, "toy", f"line {number}", etag=item.etag)

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        number = int(row["member"].removeprefix("line "))
        return bytes.fromhex(place.read_text().splitlines()[number])


def register() -> None:
    """For processes of their own: a Ray worker imports the registry anew."""
    FORMATS.update(LINE)
