"""Arithmetic on views as planes, float32 [3, H, W] in 0..255 with H = W, and on their half-plane spectra."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from clipflow_ray.images import Pixels

F32 = NDArray[np.float32]
C64 = NDArray[np.complex64]
Rng = np.random.Generator


def channels_first(view: Pixels) -> F32:
    """uint8 [H, W, 3] -> float32 [3, H, W]."""
    return np.ascontiguousarray(view.transpose(2, 0, 1), dtype=np.float32)


def quantized(view: F32) -> Pixels:
    """float32 [3, H, W] -> uint8 of the same shape, clipped to 0..255 and rounded."""
    return np.rint(np.clip(view, 0.0, 255.0)).astype(np.uint8)


def f32(values: NDArray[np.floating]) -> F32:
    """The same values as float32."""
    return np.asarray(values, dtype=np.float32)


def log_uniform(rng: Rng, range_: tuple[float, ...]) -> float:
    """Draw a number whose logarithm is uniform between those of the two ends of `range_`. Both ends are above 0."""
    return float(np.exp(rng.uniform(*np.log(range_))))


def extended(view: F32, multiple: int) -> F32:
    """Mirror the view past its lower and right border until `multiple` divides its side; a copy if it already does."""
    missing = -view.shape[1] % multiple
    return np.pad(view, ((0, 0), (0, missing), (0, missing)), mode="symmetric")


def box(planes: F32, size: int) -> F32:
    """The mean over size x size neighbours, for each channel."""
    return f32(ndimage.uniform_filter(planes, (0, size, size)))


def rfft(view: F32) -> C64:
    """Planes [3, H, W] -> their half-plane spectra, complex64 [3, H, W // 2 + 1], unshifted."""
    spectrum: C64 = fft.rfft2(view, axes=(1, 2))
    return spectrum


def irfft(spectrum: C64, size: int) -> F32:
    """The inverse of `rfft` for square planes of `size` pixels a side."""
    return f32(fft.irfft2(spectrum, s=(size, size), axes=(1, 2)))


def filtered(view: F32, transfer: NDArray[np.inexact]) -> F32:
    """Multiply the half-plane spectrum of each channel by `transfer` [..., H, W // 2 + 1]; the mean stays."""
    kind = np.complex64 if np.iscomplexobj(transfer) else np.float32
    transfer = transfer.astype(kind)
    transfer[..., 0, 0] = 1.0
    return irfft(rfft(view) * transfer, view.shape[1])


@lru_cache(maxsize=4)
def radii(size: int) -> F32:
    """Radial frequency over Nyquist on the half plane, float32 [size, size // 2 + 1]. Cached: do not write to it."""
    return f32(np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) * 2.0)


def ramp(view: F32, start: float, width: float | None = None) -> F32:
    """0 below `start`, then a linear rise to 1. The rise ends at Nyquist, or after `width` if given."""
    reach = (1.0 - start) if width is None else width
    return f32(np.clip((radii(view.shape[1]) - start) / reach, 0.0, 1.0))
