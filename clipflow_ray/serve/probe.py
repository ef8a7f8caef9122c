"""The image that /readyz has scored: generated, the same on every machine, and not a photograph."""

import io

import numpy as np
from PIL import Image

from clipflow_ray import images
from clipflow_ray.config import ImageLimits, ViewSpec
from clipflow_ray.images import Pixels

_SIDE = 256


def probe_png() -> bytes:
    """A PNG of coloured waves of several scales. PNG is lossless: the pixels do not depend on the decoder's version."""
    across, down = np.meshgrid(np.arange(_SIDE), np.arange(_SIDE))
    planes = [(across * (1 + c) + down * (3 - c)) % 256 ^ (across * down // (16 + c)) % 128 for c in range(3)]
    out = io.BytesIO()
    Image.fromarray(np.stack(planes, axis=2).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def probe_view(spec: ViewSpec) -> Pixels:
    """uint8 [spec.bytes]: the probe as the encoder sees it, decoded in this process."""
    return images.views(images.decode(probe_png(), ImageLimits()).rgb, spec)
