"""What the bytes of a file are and whether they are all there, without decoding.

The first bytes decide, not the name of a file. A format that is not decoded is named, so that a user knows what to do.
"""

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from clipflow_ray.errors import ImageError
from clipflow_ray.recognise import BMP_HEADERS, HEAD, named_kind

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF"]

# A JPEG marker inside entropy-coded data: 0xFF, then neither a stuffed zero, a restart marker nor a fill byte.
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_AVIF_BRANDS: Final = {b"avif", b"avis"}
_HEIF_BRANDS: Final = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_MOST_PAGES: Final = 65_535
_SUBFILE_TYPE: Final = 254
_DNG_VERSION: Final = 50706
_TIFF_PRIVATE: Final = 1000  # tags below are those of the standard
_TIFF_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # by type
_TIFF_TAGS: Final = {_SUBFILE_TYPE, 273, 279, 324, 325}  # and offsets and lengths of strips, and of tiles


@dataclass(frozen=True)
class Structure:
    """Facts that the container shows without decoding. If `frames` is 0, only the decoder knows the number."""

    complete: bool
    scans: int = 0
    frames: int = 0


def sniff(data: bytes) -> Format:
    """The format, recognised by the first bytes alone.

    Raises ImageError with unsupported_format if it is none that is decoded. The message names what it is instead.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] in (b"II*\x00", b"MM\x00*") and data[8:10] != b"CR":
        return "TIFF"
    if data[:2] == b"BM" and data[14:18] in BMP_HEADERS:
        return "BMP"
    if data[4:8] == b"ftyp":
        brands = _brands(data)
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & _HEIF_BRANDS:
            return "HEIF"
    _refuse(data)


def structure(data: bytes, image_format: Format) -> Structure:
    """Walk the container. Raises ImageError if it is damaged, or if it is a raw file that looks like a TIFF."""
    return _WALKS[image_format](data)


def _brands(data: bytes) -> set[bytes]:
    """The brands of a file in the ISO base media format: the major one and the compatible ones."""
    end = min(int(struct.unpack_from(">I", data)[0]), len(data), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}


def _refuse(data: bytes) -> NoReturn:
    decoded = "JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF and HEIC are decoded"
    kind = named_kind(data[:HEAD])
    named = f"{kind}; only" if kind else "no image that is known here;"
    raise ImageError("unsupported_format", f"This is {named} {decoded}.")


def _jpeg(data: bytes) -> Structure:
    """Walk the markers of the first image: count its scans and check for the end marker."""
    position, scans = 2, 0
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] == 0x00:
            break  # a marker was expected
        marker = data[position + 1]
        if marker == 0xD9:
            return Structure(True, scans)
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        position += 2 + int(struct.unpack_from(">H", data, position + 2)[0])
        if marker == 0xDA:
            scans += 1
            found = _JPEG_MARKER.search(data, position)
            if found is None:
                return Structure(False, scans)
            position = found.start()
    return Structure(data.startswith(b"\xff\xd9", position), scans)


def _png(data: bytes) -> Structure:
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT" and position + 12 + length <= len(data):
            (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
            if zlib.crc32(memoryview(data)[position + 4 : position + 8 + length]) != checksum:
                raise ImageError("decode_failed", "The PNG's checksum does not match its data.")
        position += 12 + length
        if kind == b"IEND":
            return Structure(position <= len(data))
    return Structure(False)


def _webp(data: bytes) -> Structure:
    return Structure(len(data) >= 12 and len(data) >= 8 + int(struct.unpack_from("<I", data, 4)[0]))


def _gif(data: bytes) -> Structure:
    """Walk the blocks to count frames: Pillow would decode each frame, which is slow for an animation bomb."""
    if len(data) < 13:
        return Structure(False)
    frames, position = 0, 13 + _gif_table_bytes(data[10])
    while position < len(data):
        kind = data[position]
        if kind == 0x3B:
            return Structure(True, frames=frames)
        if kind == 0x21:
            position += 2
        elif kind == 0x2C and position + 10 <= len(data):
            frames += 1
            position += 11 + _gif_table_bytes(data[position + 9])
        else:
            break
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
    return Structure(False, frames=frames)


def _gif_table_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp(data: bytes) -> Structure:
    """Compare the length with that of the pixels, which only the uncompressed kinds tell beforehand."""
    if len(data) < 30:
        return Structure(False)
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        if len(data) < 34:
            return Structure(False)
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression not in (0, 3, 6):
        return Structure(True, frames=1)
    row = (abs(width) * bits + 31) // 32 * 4
    return Structure(len(data) >= start + row * abs(height), frames=1)


def _tiff(data: bytes) -> Structure:
    """Count the pages, and check that the data of the first one lie within the file."""
    order = "<" if data[:2] == b"II" else ">"
    pages: set[int] = set()
    complete = True
    at = int(struct.unpack_from(order + "I", data, 4)[0]) if len(data) >= 8 else 0
    while at and at not in pages and len(pages) < _MOST_PAGES:
        count = int(struct.unpack_from(order + "H", data, at)[0]) if at + 2 <= len(data) else 0
        end = at + 2 + 12 * count
        if not count or end + 4 > len(data):
            return Structure(False, frames=len(pages))
        if not pages:
            complete = _tiff_page_is_whole(data, order, at + 2, count)
        pages.add(at)
        at = int(struct.unpack_from(order + "I", data, end)[0])
    return Structure(bool(pages) and complete, frames=len(pages))


def _tiff_page_is_whole(data: bytes, order: str, start: int, count: int) -> bool:
    """Whether the pixels of a page lie within the file; `count` entries of its directory begin at `start`."""
    found: dict[int, list[int]] = {}
    for at in range(start, start + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, at)
        size = number * _TIFF_BYTES.get(kind, 0)
        place = at + 8 if size <= 4 else int(struct.unpack_from(order + "I", data, at + 8)[0])
        if tag < _TIFF_PRIVATE and place + size > len(data):
            return False
        if tag in _TIFF_TAGS and kind in (3, 4):
            found[tag] = list(struct.unpack_from(f"{order}{number}{'H' if kind == 3 else 'I'}", data, place))
        elif tag == _DNG_VERSION:
            found[tag] = []
    if _DNG_VERSION in found or any(value & 1 for value in found.get(_SUBFILE_TYPE, ())):
        raise ImageError("unsupported_format", "This is a camera's raw file, whose first page is only a preview.")
    offsets, lengths = ([*found.get(strips, ()), *found.get(tiles, ())] for strips, tiles in ((273, 324), (279, 325)))
    return all(offset + length <= len(data) for offset, length in zip(offsets, lengths, strict=False))


def _boxes(data: bytes) -> Structure:
    """Walk the top boxes of a file in the ISO base media format. The decoder counts the frames."""
    at, kinds = 0, set()
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        kinds.add(kind)
        if size == 1:
            if at + 16 > len(data):
                return Structure(False)
            size = int(struct.unpack_from(">Q", data, at + 8)[0])
        if size == 0:  # the last box reaches to the end of the file
            at = len(data)
            break
        if size < 8:
            raise ImageError("decode_failed", "The file has a box of an impossible size.")
        at += size
    described, stored = bool(kinds & {b"meta", b"moov"}), b"mdat" in kinds or b"idat" in data
    return Structure(at <= len(data) and not any(data[at:]) and described and stored)


_WALKS: Final = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "TIFF": _tiff,
    "BMP": _bmp,
    "AVIF": _boxes,
    "HEIF": _boxes,
}
FORMATS: Final = tuple(_WALKS)
