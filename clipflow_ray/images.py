"""Decode untrusted bytes to RGB pixels, and make the square view that the encoder takes.

This module enforces the limits on bytes, sides, pixels and JPEG scans. `sandbox` enforces those on time and memory.

Colour rules: EXIF orientation is applied; transparency is composited on white; CMYK is converted by
Pillow's plain formula; 16-bit grey is scaled to 8 bits; embedded ICC profiles are ignored, as CLIP's own
preprocessing does. The first frame of an animation is scored.
"""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from clipflow_ray.config import ImageLimits, ViewSpec
from clipflow_ray.errors import ImageError

Pixels = NDArray[np.uint8]

_STRATUM_SIDES: Final = (256, 512, 1024, 2048)
BACKGROUND: Final = (255, 255, 255)
_PILLOW_FILTER: Final = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_EXIF_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A JPEG marker inside entropy-coded data: 0xFF, then neither a stuffed zero, a restart marker nor a fill byte.
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Sum of the luminance quantization table of ITU-T T.81 Annex K.1, which is quality 50 on the IJG scale.
_JPEG_LUMINANCE_Q50_SUM: Final = 3688


@dataclass(frozen=True)
class DecodedImage:
    """The pixels of an image and facts about its file.

    `rgb` is uint8 [height, width, 3], upright. `width` and `height` are those of the upright image, in pixels.
    After `sandbox.decode` with a ViewSpec, `rgb` holds the packed views; see `views`. `jpeg_quality` is on the IJG
    scale from 1 to 100, and None if the file has no quantization table.
    """

    rgb: Pixels
    width: int
    height: int
    format: str
    mode: str
    frames: int
    jpeg_quality: int | None
    has_exif: bool


def decode(data: bytes, limits: ImageLimits) -> DecodedImage:
    """Decode one JPEG, PNG, WebP or GIF within `limits`.

    Raises ImageError with the codes empty, too_large_bytes, unsupported_format, truncated, too_large_pixels,
    too_small or decode_failed. Only this function passes untrusted bytes to a decoder. Call it through
    `sandbox.decode`, which runs it in a child process that may be killed.
    """
    if not data:
        raise ImageError("empty", "The object has no bytes.")
    if len(data) > limits.max_bytes:
        raise ImageError("too_large_bytes", f"{len(data)} bytes; the limit is {limits.max_bytes}.")
    image_format = sniff(data)
    structure = _STRUCTURE[image_format](data)
    if not structure.complete:
        raise ImageError("truncated", f"The {image_format} ends before its end marker.")
    if structure.scans > limits.max_jpeg_scans:
        raise ImageError("decode_failed", f"{structure.scans} JPEG scans; the limit is {limits.max_jpeg_scans}.")
    try:
        with Image.open(io.BytesIO(data), formats=(image_format,)) as image:
            _check_size(image.width, image.height, limits)
            frames = min(structure.frames or int(getattr(image, "n_frames", 1)), 2**31 - 1)
            mode, quality = image.mode, _jpeg_quality(image)
            if image_format == "JPEG" and mode in ("RGB", "L"):  # same pixels as Pillow, half the time
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                _check_size(width, height, limits)  # Pillow may have read another size from a crafted header
                rgb = _upright(simplejpeg.decode_jpeg(data, "RGB", strict=False), image)
            else:
                image.load()
                if image_format == "PNG":
                    _scale_transparency(image, data[24])
                rgb = _upright(np.asarray(_to_rgb(image)), image)
            has_exif = "exif" in image.info  # read after decoding: a PNG may store EXIF after its pixels
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large_pixels", f"More than {limits.max_pixels} pixels.") from error
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("decode_failed", "Decoding needs more memory than is available.") from error
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on malformed input
        raise ImageError("decode_failed", f"The {image_format} cannot be decoded.") from error
    return DecodedImage(
        rgb=rgb,
        width=rgb.shape[1],
        height=rgb.shape[0],
        format=image_format,
        mode=mode,
        frames=frames,
        jpeg_quality=quality,
        has_exif=has_exif,
    )


def views(rgb: Pixels, spec: ViewSpec) -> Pixels:
    """The views of an image for all sizes of `spec`, one after the other: uint8 [spec.bytes]. See `by_size`."""
    return np.concatenate([view(rgb, spec, size).reshape(-1) for size in spec.sizes])


def by_size(views: Pixels, sizes: Sequence[int]) -> list[Pixels]:
    """uint8 [N, B], the views of N images as `views` packs them -> uint8 [N, S, S, 3] for each size S."""
    ends = np.cumsum([3 * size * size for size in sizes])
    parts = np.split(views, ends[:-1], axis=1)
    return [part.reshape(-1, size, size, 3) for part, size in zip(parts, sizes, strict=True)]


def view(rgb: Pixels, spec: ViewSpec, size: int) -> Pixels:
    """The uint8 [S, S, 3] view of an image, S being `size`.

    `resize` is open_clip's evaluation transform without its normalisation: `shortest` scales the short side to S and
    takes the centre, `squash` scales both sides to S. `crop` takes the centre at native resolution, and is `resize`
    if a side is shorter than S. Values of photographs differ from open_clip's own by one grey level at most.
    """
    height, width = rgb.shape[:2]
    short = min(height, width)
    if spec.kind == "resize" or short < size:
        if spec.resize_mode == "squash":
            width, height = size, size
        else:
            width, height = int(size * width / short), int(size * height / short)
        rgb = resized(rgb, width, height, spec.interpolation)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return np.ascontiguousarray(rgb[top : top + size, left : left + size])


def resized(rgb: Pixels, width: int, height: int, interpolation: Literal["bicubic", "bilinear"] = "bicubic") -> Pixels:
    """Resize uint8 [height, width, 3] with antialiased interpolation, as Pillow does.

    If no side grows, bicubic interpolation uses torch, whose vectorized kernel takes a tenth of Pillow's time. Both
    libraries resize in two passes and round to uint8 in between. Pillow starts with the vertical pass if that saves
    work. Torch always starts with the horizontal pass, so the image is transposed if Pillow would start with the
    vertical one. Bilinear interpolation always uses Pillow, because torch differs from it by two grey levels.
    """
    if interpolation == "bilinear" or width > rgb.shape[1] or height > rgb.shape[0]:
        return np.asarray(Image.fromarray(rgb).resize((width, height), _PILLOW_FILTER[interpolation]))
    import torch  # imported here: it takes seconds, and processes that only read files do not need it
    from torch.nn.functional import interpolate

    vertical_first = rgb.shape[0] - height > max(0, 2 * (rgb.shape[1] - width))
    if vertical_first:
        return resized(rgb.swapaxes(0, 1), height, width).swapaxes(0, 1)
    batch = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None]
    result: Pixels = interpolate(batch, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return result


def stratum(image_format: str, width: int, height: int) -> str:
    """The stratum of an image: its format and the range of its long side in pixels, such as `jpeg|512-1024`."""
    low, high = 0, 0
    for side in _STRATUM_SIDES:
        if max(width, height) < side:
            high = side
            break
        low = side
    return f"{image_format.lower()}|{low}-{high or ''}"


Format = Literal["JPEG", "PNG", "WEBP", "GIF"]


def sniff(data: bytes) -> Format:
    """The format, recognised by the first bytes alone. Raises ImageError with unsupported_format if it is another."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    raise ImageError("unsupported_format", "Not a JPEG, PNG, WebP or GIF.")


@dataclass(frozen=True)
class _Structure:
    """Facts that the container shows without decoding. If `frames` is 0, only the decoder knows the number."""

    complete: bool
    scans: int = 0
    frames: int = 0


def _jpeg_structure(data: bytes) -> _Structure:
    """Walk the markers of the first image: count its scans and check for the end marker."""
    position, scans = 2, 0
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] == 0x00:
            break  # a marker was expected
        marker = data[position + 1]
        if marker == 0xD9:
            return _Structure(True, scans)
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
                return _Structure(False, scans)
            position = found.start()
    return _Structure(data.startswith(b"\xff\xd9", position), scans)


def _png_structure(data: bytes) -> _Structure:
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT" and position + 12 + length <= len(data):
            (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
            if zlib.crc32(memoryview(data)[position + 4 : position + 8 + length]) != checksum:
                raise ImageError("decode_failed", "The PNG's checksum does not match its data.")
        position += 12 + length
        if kind == b"IEND":
            return _Structure(position <= len(data))
    return _Structure(False)


def _webp_structure(data: bytes) -> _Structure:
    return _Structure(len(data) >= 12 and len(data) >= 8 + int(struct.unpack_from("<I", data, 4)[0]))


def _gif_structure(data: bytes) -> _Structure:
    """Walk the blocks to count frames: Pillow would decode each frame, which is slow for an animation bomb."""
    if len(data) < 13:
        return _Structure(False)
    frames, position = 0, 13 + _gif_table_bytes(data[10])
    while position < len(data):
        kind = data[position]
        if kind == 0x3B:
            return _Structure(True, frames=frames)
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
    return _Structure(False, frames=frames)


def _gif_table_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


_STRUCTURE: Final = {
    "JPEG": _jpeg_structure,
    "PNG": _png_structure,
    "WEBP": _webp_structure,
    "GIF": _gif_structure,
}
FORMATS: Final = tuple(_STRUCTURE)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(
            "too_large_pixels",
            f"{width} x {height}; the limits are {limits.max_pixels} pixels and {limits.max_side} a side.",
        )
    if min(width, height) < limits.min_side:
        raise ImageError("too_small", f"{width} x {height}; each side must be at least {limits.min_side}.")


def _scale_transparency(image: Image.Image, bits: int) -> None:
    """Scale the transparent colour to 8 bits: Pillow keeps it at the file's depth but compares it with 8-bit pixels."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and bits in (2, 4):
        image.info["transparency"] = key * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _upright(rgb: Pixels, image: Image.Image) -> Pixels:
    """Turn `rgb` upright by the EXIF orientation of `image`. The result is writable, or torch would warn about it."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Pillow's EXIF parser raises many types on crafted metadata; no orientation is known then
        orientation = None
    if orientation in _UPRIGHT:
        return np.array(Image.fromarray(rgb).transpose(_UPRIGHT[orientation]))
    return rgb if rgb.flags.writeable else np.array(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which convert("RGB") would clip to white. In these formats, 32-bit "I" holds 16-bit data too.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        key = image.info.get("transparency")
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _jpeg_quality(image: Image.Image) -> int | None:
    """Quality on the IJG scale, estimated from the mean of the luminance table; None if there is no table."""
    tables: dict[int, list[int]] | None = getattr(image, "quantization", None)
    if not tables or len(tables.get(0, ())) != 64:
        return None
    scale = 100.0 * sum(tables[0]) / _JPEG_LUMINANCE_Q50_SUM
    quality = (200.0 - scale) / 2.0 if scale <= 100.0 else 5000.0 / scale
    return int(np.clip(round(quality), 1, 100))
