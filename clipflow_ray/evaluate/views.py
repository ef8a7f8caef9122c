"""Ray Data tasks of evaluation: make the views of an image as found, re-encoded and distorted."""

import io
from typing import Final

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from clipflow_ray import images
from clipflow_ray.config import ImageLimits, InventoryOptions, ViewSpec
from clipflow_ray.data.reading import described, read_images
from clipflow_ray.images import DecodedImage, Pixels
from clipflow_ray.place import Place

AS_FOUND: Final = "as_found"
ALIGNED: Final = "format_aligned"
RECOMPRESSED: Final = "recompressed"
VARIANTS: Final = (AS_FOUND, ALIGNED, RECOMPRESSED)
ALIGNED_SIDE: Final = 448
# The columns with the size of the re-encoded image, by variant.
SIZES: Final = {ALIGNED: "aligned_bytes", RECOMPRESSED: "recompressed_bytes"}
_ALIGNED_QUALITY: Final = 90
_RECOMPRESSED_QUALITY: Final = 85
_WEB_SIDE: Final = 768

DRAW: Final = "draw"
# Quality, quality, factor of each side, kept fraction of each side, sigma in pixels, and JPEG quality after a resize.
DISTORTIONS: Final[dict[str, tuple[float, ...]]] = {
    "jpeg": (95, 80, 60, 30),
    "webp": (90, 60, 30),
    "resize": (0.75, 0.5, 0.25),
    "crop": (0.9, 0.7, 0.5),
    "blur": (0.5, 1, 2),
    "web": (60,),
}
CASES: Final = tuple((name, level) for name, levels in DISTORTIONS.items() for level in levels)


def read_variants(
    table: pa.Table, near: Place, limits: ImageLimits, spec: ViewSpec, options: InventoryOptions
) -> pa.Table:
    """Manifest rows -> described rows with `view`, the bytes of one view per variant, and with the columns of SIZES.

    An unreadable row has no views, and its sizes are null.
    """
    outcomes = read_images(table, near, limits, options=options)
    views: list[bytes] = []
    sizes: dict[str, list[int | None]] = {name: [] for name in SIZES.values()}
    for outcome in outcomes:
        made: list[Pixels] = []
        encoded: dict[str, bytes] = {}
        if isinstance(outcome.image, DecodedImage):
            rgb = outcome.image.rgb
            encoded = {SIZES[ALIGNED]: aligned(rgb), SIZES[RECOMPRESSED]: recompressed(rgb)}
            made = [images.views(pixels, spec) for pixels in (rgb, *map(_decoded, encoded.values()))]
        views.append(b"".join(view.tobytes() for view in made))
        for name, values in sizes.items():
            values.append(len(encoded[name]) if encoded else None)
    table = described(table, outcomes, views)
    for name, values in sizes.items():
        table = table.append_column(name, pa.array(values, pa.int64()))
    return table


def read_distorted(
    table: pa.Table, near: Place, limits: ImageLimits, spec: ViewSpec, options: InventoryOptions
) -> pa.Table:
    """Manifest rows with a `draw` -> described rows with `view`: the bytes of one view per case of CASES."""
    outcomes = read_images(table, near, limits, options=options)
    views = []
    for outcome, draw in zip(outcomes, table[DRAW].to_pylist(), strict=True):
        made: list[Pixels] = []
        if isinstance(outcome.image, DecodedImage):
            made = [images.views(distorted(outcome.image.rgb, name, level, draw), spec) for name, level in CASES]
        views.append(b"".join(view.tobytes() for view in made))
    return described(table, outcomes, views)


def aligned(rgb: Pixels) -> bytes:
    """Return a JPEG of quality 90: the short side resized to 448 by bicubic, then the centre square.

    After this, format and size of a file do not depend on its class.
    """
    height, width = rgb.shape[:2]
    scale = ALIGNED_SIDE / min(height, width)
    size = (max(ALIGNED_SIDE, round(width * scale)), max(ALIGNED_SIDE, round(height * scale)))
    image = Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - ALIGNED_SIDE) // 2, (size[1] - ALIGNED_SIDE) // 2
    return _encoded(image.crop((left, top, left + ALIGNED_SIDE, top + ALIGNED_SIDE)), "JPEG", _ALIGNED_QUALITY)


def recompressed(rgb: Pixels) -> bytes:
    """Return a JPEG of quality 85 and 4:2:0 subsampling, which is Pillow's default, at the image's own size.

    After this, the compression of a file does not depend on its class. Size and earlier compression still may.
    """
    return _encoded(Image.fromarray(rgb), "JPEG", _RECOMPRESSED_QUALITY)


def distorted(rgb: Pixels, name: str, level: float, draw: int) -> Pixels:
    """uint8 [H, W, 3] -> the image after the distortion `name` of DISTORTIONS at `level`.

    `draw` seeds the position of a crop relative to the image. Equal draws give equal positions, so that both
    classes of images get the same crops.
    """
    image = Image.fromarray(rgb)
    if name == "jpeg":
        return _decoded(_encoded(image, "JPEG", int(level)))
    if name == "webp":
        return _decoded(_encoded(image, "WEBP", int(level)))
    if name == "resize":
        return np.asarray(_scaled(image, level))
    if name == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(level)))
    if name == "web":
        smaller = _scaled(image, min(1.0, _WEB_SIDE / max(image.size)))
        return _decoded(_encoded(smaller, "JPEG", int(level)))
    position = np.random.default_rng([draw, round(100 * level)]).random(2)
    height, width = (max(1, round(side * level)) for side in rgb.shape[:2])
    top, left = (int(at) for at in position * (rgb.shape[0] - height + 1, rgb.shape[1] - width + 1))
    return rgb[top : top + height, left : left + width]


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, quality=quality)
    return out.getvalue()


def _decoded(data: bytes) -> Pixels:
    """Decode bytes that this module encoded. Untrusted bytes go through the sandbox instead."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
