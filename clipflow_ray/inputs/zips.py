"""Input format `zip`: zip archives with images inside."""

import lzma
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import ReadError
from clipflow_ray.inputs.archive import Members
from clipflow_ray.inputs.format import InputFormat, Row, Source, unlisted
from clipflow_ray.place import Place

_LOCK: Final = threading.Lock()
# `zipfile` raises RuntimeError for an encrypted member and NotImplementedError for an unknown compression.
_UNREADABLE: Final = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class Zip(InputFormat):
    """Zip archives. A row names an image by its number in the archive's directory, which is its `offset`."""

    suffixes = (".zip",)
    any_file = True

    def matches(self, head: bytes, compression: str | None) -> bool:
        return compression is None and head.startswith((b"PK\x03\x04", b"PK\x05\x06"))

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row]:
        members = Members(source, options)
        try:
            with source.place.open() as file, zipfile.ZipFile(file) as archive:
                for number, member in enumerate(archive.infolist()):
                    if not member.is_dir():
                        yield members.row(member.filename, number, member.file_size)
        except _UNREADABLE as error:
            yield unlisted(source, options, f"does not read as a zip: {error}")

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        """The decompressed member. Raises ReadError with not_found, read_failed or too_large_bytes."""
        if row["bytes"] > max_bytes:
            raise ReadError("too_large_bytes", f"{row['bytes']} bytes; the limit is {max_bytes}.")
        try:
            with _LOCK:  # threads ask at the same time; only one of them should open the archive
                archive = _opened(place, row["etag"])
            member = archive.infolist()[row["offset"]]
            with archive.open(member) as file:
                return file.read(row["bytes"] + 1)[: row["bytes"]]
        except FileNotFoundError as error:
            raise ReadError("not_found", "The archive does not exist.") from error
        except (*_UNREADABLE, IndexError) as error:
            raise ReadError("read_failed", f"The member does not read: {error}") from error


@lru_cache(maxsize=4)
def _opened(place: Place, etag: str | None) -> zipfile.ZipFile:
    """An archive that stays open; a changed object on s3 has another `etag`. Its directory is read once."""
    return zipfile.ZipFile(place.open())
