"""Families that act on pixels."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage

from clipflow_ray.config import Range
from clipflow_ray.proxies.planes import F32, Rng, box, channels_first, extended, f32, log_uniform, quantized

_KERNELS: Final = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
_SEARCHED: Final = 224  # pixels a side of the blocks within which `patch_resynthesis` searches, at most


def resample(view: F32, rng: Rng, factor: Range) -> F32:
    """Shrink by `factor` and enlarge again. The two kernels are drawn independently."""
    size = view.shape[1]
    small = max(2, round(size / rng.uniform(*factor)))
    down, up = (_KERNELS[i] for i in rng.integers(len(_KERNELS), size=2))
    image = Image.fromarray(quantized(view).transpose(1, 2, 0))
    return channels_first(np.asarray(image.resize((small, small), down).resize((size, size), up)))


def self_blend(view: F32, rng: Rng, shift: Range, mix: Range) -> F32:
    """Blend in, through a smooth mask, a copy that is shifted, recoloured, and sharpened or softened."""
    size = view.shape[1]
    dx, dy = np.round(rng.uniform(*shift, size=2) * rng.choice((-1.0, 1.0), size=2)).astype(int)
    copy = np.roll(view, (dy, dx), axis=(1, 2))
    blurred = ndimage.uniform_filter(copy, (0, 3, 3))
    copy = blurred + rng.uniform(-0.2, 2.2) * (copy - blurred)
    mean = copy.mean(axis=(1, 2), keepdims=True)
    copy = mean + f32(rng.uniform(0.85, 1.2, size=(3, 1, 1))) * (copy - mean)
    coarse = rng.random((5, 5)).astype(np.float32)
    mask = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    mask = rng.uniform(*mix) * np.clip((mask - mask.mean()) * 4.0 + 0.5, 0.0, 1.0)
    return f32(view + mask * (copy - view))


def texture_loss(view: F32, rng: Rng, radius: Range, level: Range, mix: Range) -> F32:
    """Blend in a self-guided filter (He et al. 2010). It removes detail below `level` grey levels and keeps edges."""
    size = 2 * round(rng.uniform(*radius)) + 1
    epsilon = np.float32(rng.uniform(*level) ** 2)
    mean = box(view, size)
    variance = np.maximum(box(view * view, size) - mean * mean, 0.0)
    keep = f32(variance / (variance + epsilon))
    smooth = box(keep, size) * view + box(f32(mean - keep * mean), size)
    return f32(view + np.float32(rng.uniform(*mix)) * (smooth - view))


def tone(view: F32, rng: Rng, contrast: Range, saturation: Range, min_change: tuple[float]) -> F32:
    """Scale contrast around the mean by exp(contrast) and colour around grey by exp(saturation).

    If neither draw reaches `min_change` in magnitude, both are scaled up until the larger one does.
    """
    change = np.array([rng.uniform(*contrast), rng.uniform(*saturation)])
    change *= max(1.0, min_change[0] / max(float(np.abs(change).max()), 1e-6))
    grey = view.mean(axis=0)
    mean = grey.mean()
    colour = (view - grey) * np.float32(np.exp(change[1]))
    return f32(mean + (grey - mean + colour) * np.float32(np.exp(change[0])))


def warp(view: F32, rng: Rng, cells: tuple[float, float], shift: Range) -> F32:
    """Move pixels by a smooth random field with `cells` knots a side and a standard deviation of `shift` pixels."""
    size, knots = view.shape[1], int(rng.integers(int(cells[0]), int(cells[1]) + 1))
    field = np.stack([_field(rng, knots, size) for _ in range(2)])
    field *= np.float32(rng.uniform(*shift)) / max(float(field.std()), 1e-6)
    at = np.indices((size, size), dtype=np.float32) + field
    return np.stack([f32(ndimage.map_coordinates(plane, at, order=3, mode="reflect")) for plane in view])


def defocus(view: F32, rng: Rng, sigma: Range, area: Range) -> F32:
    """Blur about the share `area` of the view, chosen by a smooth random mask, with a Gaussian of `sigma` pixels."""
    field = _field(rng, 4, view.shape[1])
    edge = np.quantile(field, 1.0 - rng.uniform(*area))
    mask = np.clip((field - edge) * 2.0 + 0.5, 0.0, 1.0)
    return f32(view + mask * (_gaussian(view, rng.uniform(*sigma)) - view))


def halo(view: F32, rng: Rng, sigma: Range, amount: Range) -> F32:
    """Raise local contrast: add `amount` times the difference from a Gaussian blur of `sigma` pixels."""
    blurred = _gaussian(view, log_uniform(rng, sigma))
    return f32(view + np.float32(rng.uniform(*amount)) * (view - blurred))


def glow(view: F32, rng: Rng, sigma: Range, mix: Range) -> F32:
    """Blend in the view screened with its own Gaussian blur of `sigma` pixels, as a soft-focus lens does."""
    blurred = np.clip(_gaussian(view, rng.uniform(*sigma)), 0.0, 255.0)
    screened = 255.0 - (255.0 - view) * (255.0 - blurred) / 255.0
    return f32(view + np.float32(rng.uniform(*mix)) * (screened - view))


def chroma_bleed(view: F32, rng: Rng, sigma: Range, shift: Range) -> F32:
    """Blur the colour by `sigma` pixels and move it by `shift` pixels; luminance stays."""
    grey = view.mean(axis=0)
    move = np.round(rng.uniform(*shift, size=2) * rng.choice((-1.0, 1.0), size=2)).astype(int)
    return f32(grey + np.roll(_gaussian(view - grey, rng.uniform(*sigma)), move, axis=(1, 2)))


def median(view: F32, rng: Rng, radius: tuple[float, float], mix: Range) -> F32:
    """Blend in a median filter of 2 * radius + 1 pixels a side: texture becomes patches with sharp edges."""
    size = 2 * int(rng.integers(int(radius[0]), int(radius[1]) + 1)) + 1
    image = Image.fromarray(quantized(view).transpose(1, 2, 0)).filter(ImageFilter.MedianFilter(size))
    return f32(view + np.float32(rng.uniform(*mix)) * (channels_first(np.asarray(image)) - view))


def palette(view: F32, rng: Rng, colours: Range, mix: Range) -> F32:
    """Blend in the view reduced to `colours` of its own colours, without dither."""
    count = round(log_uniform(rng, colours))
    image = Image.fromarray(quantized(view).transpose(1, 2, 0))
    few = image.quantize(count, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return f32(view + np.float32(rng.uniform(*mix)) * (channels_first(np.asarray(few)) - view))


def patch_bottleneck(view: F32, rng: Rng, sides: tuple[float, ...], kept: Range) -> F32:
    """Keep the leading principal components of the patches of the view, as a linear auto-encoder would.

    The side of the patches is one of `sides`, in pixels. `kept` is the share of the components.
    """
    side = int(rng.choice(sides))
    patches = _patches(extended(view, side), side)
    mean = patches.mean(axis=0)
    _, basis = np.linalg.eigh((patches - mean).T @ (patches - mean))  # ascending
    share = log_uniform(rng, kept)
    leading = basis[:, -max(1, round(share * patches.shape[1])) :]
    return _assembled(f32(mean + (patches - mean) @ leading @ leading.T), side, view.shape[1])


def patch_resynthesis(view: F32, rng: Rng, sides: tuple[float, ...], mix: Range) -> F32:
    """Blend in the view rebuilt from its own patches: each is replaced by the nearest one of a shifted grid.

    The side of the patches is one of `sides`, in pixels. Each patch keeps its brightness. The search is exhaustive
    within equal blocks of at most 224 pixels a side, so its cost grows with the pixels and not with their square.
    """
    side = int(rng.choice(sides))
    dy, dx = rng.integers(1, side, size=2)
    whole = extended(view, side)
    patches, others = _patches(whole, side), _patches(np.roll(whole, (-dy, -dx), axis=(1, 2)), side)
    mean = others.mean(axis=1, keepdims=True)
    shape, level = others - mean, patches.mean(axis=1, keepdims=True)
    own = patches - level
    rebuilt = np.empty_like(patches)
    for block in _blocks(whole.shape[1], side):
        found = shape[block]
        distance = np.square(found).sum(axis=1)[None, :] - 2.0 * own[block] @ found.T
        rebuilt[block] = found[distance.argmin(axis=1)] + level[block]
    return f32(view + np.float32(rng.uniform(*mix)) * (_assembled(rebuilt, side, view.shape[1]) - view))


def _field(rng: Rng, knots: int, size: int) -> F32:
    """A smooth random field of about unit variance, float32 [size, size]."""
    coarse = rng.standard_normal((knots, knots)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _gaussian(view: F32, sigma: float) -> F32:
    return f32(ndimage.gaussian_filter(view, (0, sigma, sigma), truncate=3.0))


def _patches(view: F32, side: int) -> F32:
    """[3, H, W] -> one row of 3 * side * side values for each patch of a grid; `side` divides H and W."""
    count = view.shape[1] // side
    cut = view.reshape(3, count, side, count, side)
    return cut.transpose(1, 3, 0, 2, 4).reshape(count * count, 3 * side * side)


def _assembled(patches: F32, side: int, size: int) -> F32:
    """The inverse of `_patches`, cut to [3, size, size]."""
    count = -(-size // side)
    grid = patches.reshape(count, count, 3, side, side).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(grid.reshape(3, count * side, count * side)[:, :size, :size])


def _blocks(size: int, side: int) -> Iterator[NDArray[np.intp]]:
    """The rows of `_patches` that lie in each block of at most `_SEARCHED` pixels a side."""
    count = size // side
    parts = np.array_split(np.arange(count), -(-size // _SEARCHED))
    for rows in parts:
        for columns in parts:
            yield (rows[:, None] * count + columns).ravel()
