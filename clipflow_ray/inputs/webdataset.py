"""Input formats `webdataset` and `tarstream`: tar files with images inside, and compressed ones."""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import ReadError
from clipflow_ray.inputs.archive import Members
from clipflow_ray.inputs.compressed import DAMAGED, Forward, opened
from clipflow_ray.inputs.format import InputFormat, Row, Source, problem, unlisted
from clipflow_ray.place import Place

_BLOCK: Final = 512
_PADDING: Final = 2**16  # bytes of zeros that a tar may have behind its end marker
_SHORT: Final = "The archive ends within this member."
_UNREADABLE: Final = (tarfile.TarError, ValueError, OverflowError, RecursionError, *DAMAGED)
_STREAMS: Final = Forward()


class Webdataset(InputFormat):
    """Tar shards. A row names an image by its offset and size in the shard, so that one range request reads it."""

    suffixes = (".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
    any_file = True

    def matches(self, head: bytes, compression: str | None) -> bool:
        return compression is None and _is_tar(head)

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row]:
        """The members of a shard. Only the headers are read. A damaged shard gets a row after those of its members."""
        members, seen = Members(source, options), 0
        try:
            with source.place.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for row in _rows(archive, members, left_out):
                    seen += 1
                    yield row
                file.seek(archive.offset)
                after = file.read(_PADDING)
            if not after.startswith(bytes(_BLOCK)):
                why = "is cut off" if not after else "is damaged"
                yield unlisted(source, options, f"{why} after {seen} members: it has no end marker there.")
            elif after.strip(b"\0"):
                yield unlisted(source, options, f"holds more behind its end marker, after {seen} members.")
        except _UNREADABLE as error:
            yield unlisted(source, options, f"does not read as a tar after {seen} members: {error}")

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        data = place.read(max_bytes, row["etag"], (row["offset"], row["bytes"])) if row["bytes"] else b""
        if len(data) < row["bytes"]:
            raise ReadError("truncated", _SHORT)
        return data


class Tarstream(Webdataset):
    """Compressed tar files. A row names an image by its offset in the decompressed stream, which is read in order."""

    in_order = True

    def matches(self, head: bytes, compression: str | None) -> bool:
        return compression is not None and _is_tar(head)

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row]:
        """The members of an archive, which is decompressed once for it."""
        members, seen = Members(source, options), 0
        try:
            with opened(source.place) as file, tarfile.open(fileobj=file, mode="r|") as archive:
                for row in _rows(archive, members, left_out):
                    seen += 1
                    yield row
                while file.read(_PADDING):  # damage behind the last member is found by its checksum
                    pass
        except _UNREADABLE as error:
            yield unlisted(source, options, f"does not decompress to a tar after {seen} members: {error}")

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        if row["bytes"] > max_bytes:
            raise ReadError("too_large_bytes", f"{row['bytes']} bytes; the limit is {max_bytes}.")
        try:
            data = _STREAMS.read(place, row["etag"], row["offset"], row["bytes"])
        except FileNotFoundError as error:
            raise ReadError("not_found", "The archive does not exist.") from error
        except DAMAGED as error:
            raise ReadError("read_failed", f"The archive does not decompress up to this member: {error}") from error
        if len(data) < row["bytes"]:
            raise ReadError("truncated", _SHORT)
        return data


def _is_tar(head: bytes) -> bool:
    if head.startswith(bytes(_BLOCK)):
        return True  # the end marker alone: an empty archive
    try:
        tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _rows(archive: tarfile.TarFile, members: Members, left_out: Counter[str]) -> Iterator[Row]:
    """The rows of the members. A link to a member is that member's content under another name."""
    files: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str]] = []
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # or tarfile keeps every header, of maybe millions
        if member.isfile() and not member.issparse():
            files[posixpath.normpath(member.name)] = (member.offset_data, member.size)
            yield members.row(member.name, member.offset_data, member.size)
        elif member.islnk():
            links.append((member.name, posixpath.normpath(member.linkname)))
        elif member.issym():
            target = posixpath.join(posixpath.dirname(member.name), member.linkname)
            links.append((member.name, posixpath.normpath(target)))
        elif member.issparse():
            yield members.row(member.name, None, None, problem("read_failed", "Sparse members of a tar are not read."))
        elif not member.isdir():
            left_out["devices and pipes in archives"] += 1
    for name, target in links:
        if target in files:
            yield members.row(name, *files[target])
        else:
            yield members.row(name, None, None, problem("not_found", f"It is a link to {target}, which is not there."))
