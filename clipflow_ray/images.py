"""Decode untrusted bytes to RGB pixels, and make the square view that the encoder takes.

This module enforces the limits on bytes, sides, pixels and JPEG scans. `sandbox` enforces those on time and memory.

Colour rules: EXIF orientation is applied; transparency is composited on white; CMYK is converted by
Pillow's plain formula; 16-bit grey is scaled to 8 bits; embedded ICC profiles are ignored, as CLIP's own
preprocessing does. The first frame of an animation and the first page of a TIFF are scored.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image

from clipflow_ray.config import ImageLimits, ViewSpec
from clipflow_ray.containers import Format, Structure, sniff, structure
from clipflow_ray.errors import ImageError

try:
    import pillow_heif  # an optional package: its codecs have licences of their own
except ImportError:
    pillow_heif = None

Pixels = NDArray[np.uint8]

_STRATUM_SIDES: Final = (256, 512, 1024, 2048)
BACKGROUND: Final = (255, 255, 255)
_PILLOW_FILTER: Final = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_EXIF_ORIENTATION: Final = 0x0112
_BITS, _PHOTOMETRIC, _EXIF_OF_TIFF = 0x0102, 0x0106, 0x8769
# Modes with a scale that is known. Floating point, 32 bits and CIELAB have none.
_TIFF_MODES: Final = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}
# Sum of the luminance quantization table of ITU-T T.81 Annex K.1, which is quality 50 on the IJG scale.
_JPEG_LUMINANCE_Q50_SUM: Final = 3688
_BAND_PIXELS: Final = 2**22  # an image is converted in bands of so many pixels, which bounds the memory

# One image is decoded on one core, and time on all threads counts.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
if pillow_heif is not None:
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener()


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
    """Decode one image of `containers.FORMATS` within `limits`.

    Raises ImageError with the codes empty, too_large_bytes, unsupported_format, truncated, too_large_pixels,
    too_small or decode_failed. Only this function passes untrusted bytes to a decoder. Call it through
    `sandbox.decode`, which runs it in a child process that may be killed.
    """
    if not data:
        raise ImageError("empty", "The object has no bytes.")
    if len(data) > limits.max_bytes:
        raise ImageError("too_large_bytes", f"{len(data)} bytes; the limit is {limits.max_bytes}.")
    image_format = sniff(data)
    if image_format == "HEIF" and pillow_heif is None:
        raise ImageError("unsupported_format", "This is a HEIC image; install `pillow-heif`, or convert it to JPEG.")
    found = structure(data, image_format)
    if not found.complete:
        raise ImageError("truncated", f"The {image_format} is cut off before its end.")
    if found.scans > limits.max_jpeg_scans:
        raise ImageError("decode_failed", f"{found.scans} JPEG scans; the limit is {limits.max_jpeg_scans}.")
    try:
        with Image.open(io.BytesIO(data), formats=(image_format,)) as image:
            return _decoded(data, image, image_format, found, limits)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large_pixels", f"More than {limits.max_pixels} pixels.") from error
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("decode_failed", "Decoding needs more memory than is available.") from error
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on malformed input
        raise ImageError("decode_failed", f"The {image_format} cannot be decoded.") from error


def _decoded(
    data: bytes, image: Image.Image, image_format: Format, found: Structure, limits: ImageLimits
) -> DecodedImage:
    _check_size(image.width, image.height, limits)
    frames = min(found.frames or int(getattr(image, "n_frames", 1)), 2**31 - 1)
    mode, quality = image.mode, _jpeg_quality(image)
    tags: Any = getattr(image, "tag_v2", {})  # those of a TIFF
    if image_format == "TIFF" and (mode not in _TIFF_MODES or tags.get(_BITS) == (12,)):
        raise ImageError("unsupported_format", "Of TIFFs, those with 1, 8 or 16 bits a sample are decoded.")
    if image_format == "JPEG" and mode in ("RGB", "L"):  # same pixels as Pillow, half the time
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, limits)  # Pillow may have read another size from a crafted header
        rgb = simplejpeg.decode_jpeg(data, "RGB", strict=False)
    else:
        image.load()
        if image_format == "PNG":
            _scale_transparency(image, data[24])
        rgb = _rgb(image)
        if image_format == "TIFF" and mode.startswith("I") and tags.get(_PHOTOMETRIC) == 0:
            rgb = 255 - rgb  # Pillow inverts 8 bits of white-is-zero itself, but not 16
    rgb = _upright(rgb, image)
    return DecodedImage(
        rgb=rgb,
        width=rgb.shape[1],
        height=rgb.shape[0],
        format=image_format,
        mode=mode,
        frames=frames,
        jpeg_quality=quality,
        # Read after decoding: a PNG may store EXIF after its pixels. A TIFF has a directory of its own for it.
        has_exif=image.info.get("exif") is not None or _EXIF_OF_TIFF in tags,
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


def _rgb(image: Image.Image) -> Pixels:
    """uint8 [height, width, 3] of a loaded image, converted band by band."""
    rows = max(1, _BAND_PIXELS // image.width)
    if rows >= image.height:
        return np.asarray(_to_rgb(image))
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        rgb[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, image.width, bottom))))
    return rgb


def _upright(rgb: Pixels, image: Image.Image) -> Pixels:
    """Turn `rgb` upright by the EXIF orientation of `image`. The result is writable, or torch would warn about it."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Pillow's EXIF parser raises many types on crafted metadata; no orientation is known then
        orientation = None
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return rgb if rgb.flags.writeable and rgb.flags.c_contiguous else np.array(rgb, order="C")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which convert("RGB") would clip to white. In PNGs, 32-bit "I" holds 16-bit data too.
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
