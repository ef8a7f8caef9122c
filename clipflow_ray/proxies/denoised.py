"""Families that smooth as denoisers do: they remove weak noise and texture and keep edges. Levels are in 0..255."""

import math
from typing import Final

import numpy as np
from scipy import fft
from skimage import restoration

from clipflow_ray.config import Range
from clipflow_ray.proxies.planes import F32, Rng, extended, f32, log_uniform

_TV_STEPS: Final = 60
_STRIP: Final = 32  # rows that `bilateral` filters at a time: their arrays stay in the cache of the processor


def dct_shrinkage(view: F32, rng: Rng, sides: tuple[float, ...], level: Range) -> F32:
    """Soft-threshold the DCT of blocks at `level` (Donoho 1995); the mean of each block stays.

    The side of the blocks is one of `sides`, in pixels; 2 is the Haar wavelet. The grid has a random offset.
    """
    side = int(rng.choice(sides))
    shift = tuple(int(at) for at in rng.integers(side, size=2))
    size, whole = view.shape[1], extended(view, side)
    count = whole.shape[1] // side
    blocks = np.roll(whole, shift, axis=(1, 2)).reshape(3, count, side, count, side)
    found = fft.dctn(blocks, axes=(2, 4), norm="ortho")
    shrunk = np.sign(found) * np.maximum(np.abs(found) - log_uniform(rng, level), 0.0)
    shrunk[:, :, 0, :, 0] = found[:, :, 0, :, 0]
    smooth = fft.idctn(shrunk, axes=(2, 4), norm="ortho").reshape(whole.shape)
    return f32(np.roll(smooth, (-shift[0], -shift[1]), axis=(1, 2))[:, :size, :size])


def total_variation(view: F32, rng: Rng, level: Range, mix: Range) -> F32:
    """Blend in total-variation denoising (Chambolle 2004) with the weight `level`."""
    weight = log_uniform(rng, level) / 255.0
    smooth = restoration.denoise_tv_chambolle(view / 255.0, weight, channel_axis=0, max_num_iter=_TV_STEPS)
    return f32(view + rng.uniform(*mix) * (255.0 * smooth - view))


def non_local_means(view: F32, rng: Rng, level: Range, mix: Range) -> F32:
    """Blend in non-local means (Buades et al. 2005). Patches are 5 x 5; those that differ by `level` weigh 1 / e."""
    strength = log_uniform(rng, level) / 255.0
    smooth = restoration.denoise_nl_means(view / 255.0, 5, 5, strength, fast_mode=True, channel_axis=0)
    return f32(view + rng.uniform(*mix) * (255.0 * smooth - view))


def bilateral(view: F32, rng: Rng, sigma: Range, level: Range, mix: Range) -> F32:
    """Blend in a bilateral filter (Tomasi and Manduchi 1998).

    The window reaches three times `sigma` pixels to each side. Pixels whose channels all differ by `level` weigh
    exp(-1/2). The spatial weights are those of scikit-image, see `_spatial_exponents`.
    """
    strength = log_uniform(rng, level)
    exponents = _spatial_exponents(rng.uniform(*sigma))
    reach, size = len(exponents) // 2, view.shape[1]
    pixels = np.clip(view, 0.0, 255.0)
    around = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    scale = np.float32(-0.5 / (3.0 * strength**2))
    smooth = np.empty_like(pixels)
    for top in range(0, size, _STRIP):
        centre = pixels[:, top : top + _STRIP]
        total, weight = np.zeros(centre.shape[1:], np.float32), np.empty(centre.shape[1:], np.float32)
        summed, change = np.zeros_like(centre), np.empty_like(centre)
        for (dy, dx), exponent in np.ndenumerate(exponents):
            neighbour = around[:, top + dy : top + dy + centre.shape[1], dx : dx + size]
            np.subtract(neighbour, centre, out=change)
            np.einsum("chw,chw->hw", change, change, out=weight)
            np.exp(weight * scale + exponent, out=weight)
            total += weight
            summed += np.multiply(neighbour, weight, out=change)
        smooth[:, top : top + _STRIP] = summed / total
    return f32(view + rng.uniform(*mix) * (smooth - view))


def _spatial_exponents(sigma: float) -> F32:
    """Logarithms of the spatial weights of `skimage.restoration.denoise_bilateral`, float32 [side, side].

    scikit-image 0.26 reads a table of side + 1 columns as if it had `side` columns. Its weights are therefore not
    centred: the largest lies two rows below the centre and side // 2 - 1 columns to its left. The strengths of
    `bilateral` were chosen with these weights, so they stay.
    """
    side = max(5, 2 * math.ceil(3.0 * sigma) + 1)
    axis = np.arange(-(side // 2) - 1, side // 2 + 1)
    table = -0.5 * (axis[:, None] ** 2 + axis**2) / sigma**2
    return f32(table.ravel()[: side * side].reshape(side, side))
