"""An input format that only tests have: text files with one encoded image a line, in hex digits."""

from collections import Counter
from collections.abc import Iterator

from clipflow_ray.config import InventoryOptions
from clipflow_ray.inputs.format import InputFormat, Row, Source, manifest_row
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place

LINE = {"hex": "tests.hex_format:Hex"}  # what a new format adds to the registry


class Hex(InputFormat):
    suffixes = (".hex",)

    def matches(self, head: bytes, compression: str | None) -> bool:
        return compression is None and not set(head) - set(b"0123456789abcdef\n")

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row]:
        for number in range(len(source.place.read_text().splitlines())):
            yield manifest_row(source, source.place.uri, "toy", f"line {number}", etag=source.etag)

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        number = int(row["member"].removeprefix("line "))
        return bytes.fromhex(place.read_text().splitlines()[number])


def register() -> None:
    """For processes of their own: a Ray worker imports the registry anew."""
    FORMATS.update(LINE)
