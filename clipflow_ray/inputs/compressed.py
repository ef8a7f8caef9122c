"""Compressed files: gzip, zstd, bzip2 and xz, recognised by their first bytes and read from start to end."""

import io
import lzma
import threading
from collections import OrderedDict
from typing import BinaryIO, Final, cast

import pyarrow as pa

from clipflow_ray.place import Place
from clipflow_ray.recognise import HEAD

_MAGIC: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_BUFFER: Final = 2**16
_STEP: Final = 2**20
_OPEN: Final = 4
# What the decompressors raise for damaged data. pyarrow's errors of decompression are OSErrors.
DAMAGED: Final = (OSError, EOFError, lzma.LZMAError, pa.ArrowException)


def compression(head: bytes) -> str | None:
    """The compression of a file that begins with `head`, or None."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def opened(place: Place) -> BinaryIO:
    """The content of a file, decompressed if it is compressed; read from start to end. Raises OSError."""
    stream = io.BufferedReader(cast(io.RawIOBase, place.stream()), _BUFFER)
    kind = compression(stream.peek(8))
    if kind is None:
        return stream
    if kind == "xz":
        return cast(BinaryIO, lzma.open(stream))
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), kind), _BUFFER)


def head_of(place: Place) -> tuple[bytes, str | None]:
    """The first bytes of a file, decompressed if it is compressed, and its compression. Raises one of DAMAGED."""
    with place.stream() as stream:
        kind = compression(stream.read(8))
    with opened(place) as stream:
        return stream.read(HEAD), kind


class Forward:
    """Decompressed files of this process, each read at rising positions: a read before the last one starts anew.

    Only a few stay open. A thread reads one file at a time.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Place, str | None], tuple[BinaryIO, int]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: Place, etag: str | None, offset: int, size: int) -> bytes:
        """`size` bytes from the position `offset` of the decompressed file, fewer at its end. Raises one of DAMAGED."""
        with self._lock:
            file, at = self._files.pop((place, etag), (None, 0))
        if file is None or at > offset:
            if file is not None:
                file.close()
            file, at = opened(place), 0
        while at < offset:
            skipped = len(file.read(min(_STEP, offset - at)))
            if not skipped:
                return b""
            at += skipped
        data = file.read(size)
        with self._lock:
            self._files[place, etag] = (file, at + len(data))
            while len(self._files) > _OPEN:
                _, (oldest, _) = self._files.popitem(last=False)
                oldest.close()
        return data
