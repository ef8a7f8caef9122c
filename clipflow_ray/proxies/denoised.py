"""Families that smooth as denoisers do: weak noise and texture go, edges stay. Levels are grey levels of 0..255."""

import math
from typing import Final

import numpy as np
from scipy import fft
from skimage import restoration

from clipflow_ray.config import Range
from clipflow_ray.proxies.planes import F32, Rng, f32, log_uniform

_TV_STEPS: Final = 60


def dct_shrinkage(view: F32, rng: Rng, sides: tuple[float, ...], level: Range) -> F32:
    """Soft-threshold the DCT of blocks at `level` (Donoho 1995); their means stay.

    Blocks have one of `sides` pixels a side, which must divide the view's, on a shifted grid; 2 is Haar's wavelet.
    """
    side = int(rng.choice(sides))
    shift = tuple(int(at) for at in rng.integers(side, size=2))
    count = view.shape[1] // side
    blocks = np.roll(view, shift, axis=(1, 2)).reshape(3, count, side, count, side)
    found = fft.dctn(blocks, axes=(2, 4), norm="ortho")
    shrunk = np.sign(found) * np.maximum(np.abs(found) - log_uniform(rng, level), 0.0)
    shrunk[:, :, 0, :, 0] = found[:, :, 0, :, 0]
    smooth = fft.idctn(shrunk, axes=(2, 4), norm="ortho").reshape(view.shape)
    return f32(np.roll(smooth, (-shift[0], -shift[1]), axis=(1, 2)))


def total_variation(view: F32, rng: Rng, level: Range, mix: Range) -> F32:
    """Blend in total-variation denoising (Chambolle 2004) of a weight of `level`."""
    weight = log_uniform(rng, level) / 255.0
    smooth = restoration.denoise_tv_chambolle(view / 255.0, weight, channel_axis=0, max_num_iter=_TV_STEPS)
    return f32(view + rng.uniform(*mix) * (255.0 * smooth - view))


def non_local_means(view: F32, rng: Rng, level: Range, mix: Range) -> F32:
    """Blend in non-local means (Buades et al. 2005): patches of 5 pixels a side that differ by `level` weigh 1 / e."""
    strength = log_uniform(rng, level) / 255.0
    smooth = restoration.denoise_nl_means(view / 255.0, 5, 5, strength, fast_mode=True, channel_axis=0)
    return f32(view + rng.uniform(*mix) * (255.0 * smooth - view))


def bilateral(view: F32, rng: Rng, sigma: Range, level: Range, mix: Range) -> F32:
    """Blend in a bilateral filter (Tomasi and Manduchi 1998) of the deviations `sigma` (pixels) and `level`."""
    strength = log_uniform(rng, level) / 255.0 / math.sqrt(3.0)  # skimage divides by the number of channels
    pixels = np.ascontiguousarray(np.clip(view.transpose(1, 2, 0) / 255.0, 0.0, 1.0))
    smooth = restoration.denoise_bilateral(
        pixels, sigma_color=strength, sigma_spatial=rng.uniform(*sigma), mode="symmetric", channel_axis=-1
    )
    return f32(view + rng.uniform(*mix) * (255.0 * smooth.transpose(2, 0, 1) - view))
