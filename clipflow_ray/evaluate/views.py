"""Ray Data task of evaluation: an image -> its view as found, and after one re-encode that both classes share."""

import io
from typing import Final

import pyarrow as pa
from PIL import Image

from clipflow_ray import images
from clipflow_ray.config import ImageLimits, S3Options
from clipflow_ray.data.reading import VIEW, described, read_images
from clipflow_ray.images import DecodedImage, Pixels, ViewKind

VARIANTS: Final = ("as_found", "format_aligned")
_ALIGNED_SIDE: Final = 448
_ALIGNED_QUALITY: Final = 90


def read_both(table: pa.Table, s3: S3Options, limits: ImageLimits, kind: ViewKind) -> pa.Table:
    """Manifest rows -> described rows with `view`: the bytes of one view per variant, none on error."""
    outcomes = read_images(table, s3, limits)
    views = []
    for outcome in outcomes:
        pair = []
        if isinstance(outcome.image, DecodedImage):
            pair = [images.view(rgb, kind) for rgb in (outcome.image.rgb, aligned(outcome.image.rgb))]
        views.append(b"".join(view.tobytes() for view in pair))
    return described(table, outcomes).append_column(VIEW, pa.array(views, pa.large_binary()))


def aligned(rgb: Pixels) -> Pixels:
    """Short side to 448 by bicubic, centre square, JPEG at quality 90: format and size tell nothing any more."""
    height, width = rgb.shape[:2]
    scale = _ALIGNED_SIDE / min(height, width)
    size = (max(_ALIGNED_SIDE, round(width * scale)), max(_ALIGNED_SIDE, round(height * scale)))
    image = Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - _ALIGNED_SIDE) // 2, (size[1] - _ALIGNED_SIDE) // 2
    encoded = io.BytesIO()
    image.crop((left, top, left + _ALIGNED_SIDE, top + _ALIGNED_SIDE)).save(encoded, "JPEG", quality=_ALIGNED_QUALITY)
    return images.decode(encoded.getvalue(), ImageLimits()).rgb
