"""Families that act on the spectrum. Frequencies are radii over Nyquist: 1.0 is half a cycle per pixel."""

from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import skimage.data
from PIL import Image
from scipy import ndimage

from clipflow_ray import images
from clipflow_ray.config import Range
from clipflow_ray.proxies.planes import F32, Rng, channels_first, f32, filtered, irfft, radii, ramp, rfft

# Photographs that scikit-image ships: a proxy depends on its own image and seed alone, not on what else is read.
_DONORS: Final = ("astronaut.png", "chelsea.png", "coffee.png", "gravel.png", "motorcycle_left.png", "rocket.jpg")


def radial_gain_up(view: F32, rng: Rng, start: Range, log_gain: Range) -> F32:
    """Amplify frequencies above `start` by a ramp that reaches exp(log_gain) at Nyquist."""
    return filtered(view, np.exp(rng.uniform(*log_gain) * ramp(view, rng.uniform(*start))))


def radial_gain_down(view: F32, rng: Rng, start: Range, log_gain: Range) -> F32:
    """Damp frequencies above `start` by a ramp that reaches exp(-log_gain) at Nyquist."""
    return filtered(view, np.exp(-rng.uniform(*log_gain) * ramp(view, rng.uniform(*start))))


def low_pass(view: F32, rng: Rng, cutoff: Range, order: Range) -> F32:
    """Butterworth low-pass."""
    radius = radii(view.shape[1]) / rng.uniform(*cutoff)
    return filtered(view, 1.0 / np.sqrt(1.0 + radius ** (2.0 * rng.uniform(*order))))


def slope(view: F32, rng: Rng, start: Range, exponent: Range, min_magnitude: tuple[float]) -> F32:
    """Change the power-law slope above `start`: amplitude times (r / start) ** -exponent."""
    gamma = rng.uniform(*exponent)
    gamma = np.copysign(max(abs(gamma), min_magnitude[0]), gamma)
    begin = rng.uniform(*start)
    return filtered(view, np.maximum(radii(view.shape[1]) / begin, 1.0) ** -gamma)


def lattice_peaks(view: F32, rng: Rng, periods: tuple[float, ...], amplitude: Range) -> F32:
    """Add a periodic pattern of one period in pixels, as strided up-sampling leaves it.

    The pattern is modulated by local contrast and has a standard deviation of `amplitude` grey levels.
    """
    size, period = view.shape[1], int(rng.choice(periods))
    cell = rng.standard_normal((period, period)).astype(np.float32)
    cell -= cell.mean()
    repeats = -(-size // period)
    pattern = np.tile(cell / max(float(cell.std()), 1e-6), (repeats, repeats))[:size, :size]
    grey = view.mean(axis=0)
    contrast = ndimage.uniform_filter(np.abs(grey - ndimage.uniform_filter(grey, 9)), 9)
    contrast = 0.5 + 0.5 * contrast / max(float(contrast.mean()), 1e-6)
    return view + f32(rng.uniform(*amplitude) * pattern * np.minimum(contrast, 3.0))


def replicas(view: F32, rng: Rng, factors: tuple[float, ...], mix: Range) -> F32:
    """Replace part of the band above 1/factor by the spectral replicas of a strided down- and up-sampling."""
    size, factor = view.shape[1], int(rng.choice(factors))
    low = filtered(view, (radii(size) <= 1.0 / factor).astype(np.float32))[:, ::factor, ::factor]
    kind = rng.integers(3)
    if kind == 0:
        mean = low.mean(axis=(1, 2), keepdims=True)  # inserted as well, it would be a lattice of its own
        up = np.zeros_like(view)
        up[:, ::factor, ::factor] = (low - mean) * factor
        up += mean
    else:
        up = np.repeat(np.repeat(low, factor, axis=1), factor, axis=2)[:, :size, :size]
        if kind == 2:
            up = f32(ndimage.uniform_filter(up, (0, factor, factor), mode="wrap"))
    band = ramp(view, 1.0 / factor, width=0.1) * rng.uniform(*mix)
    spectrum = rfft(view)
    return irfft(spectrum + band * (rfft(up) - spectrum), size)


def log_amplitude_field(view: F32, rng: Rng, sigma: Range, start: Range) -> F32:
    """Multiply the amplitude by exp of a smooth random field over the frequency plane, the same per channel."""
    size = view.shape[1]
    noise = rng.standard_normal((8, 8)).astype(np.float32)
    field = np.asarray(Image.fromarray(noise).resize((size // 2 + 1, size), Image.Resampling.BICUBIC))
    # Rows of a half-plane spectrum start at DC: unshifted, the field would jump there.
    field = np.fft.ifftshift(field, axes=0) / max(float(field.std()), 1e-6)
    return filtered(view, np.exp(rng.uniform(*sigma) * field * ramp(view, rng.uniform(*start), width=0.1)))


def phase_jitter(view: F32, rng: Rng, start: Range, sigma: Range) -> F32:
    """Add Gaussian noise of `sigma` radians to the phase above `start`, the same for all channels."""
    size = view.shape[1]
    noise = rng.standard_normal((size, size // 2 + 1)).astype(np.float32)
    # A real image needs antisymmetric phase on the two columns that are their own mirror.
    mirror = noise[:, (0, -1)]
    noise[:, (0, -1)] = (mirror - np.roll(mirror[::-1], 1, axis=0)) / np.sqrt(2.0)
    angle = rng.uniform(*sigma) * noise * ramp(view, rng.uniform(*start), width=0.2)
    return filtered(view, np.exp(1j * angle))


def rotated_amplitude(view: F32, rng: Rng, start: Range, mix: Range) -> F32:
    """Move the amplitude above `start` towards that of the transposed view: power changes with angle alone."""
    return _towards(view, np.abs(rfft(view.transpose(0, 2, 1))), rng.uniform(*mix), rng.uniform(*start))


def amplitude_transplant(view: F32, rng: Rng, start: Range, mix: Range) -> F32:
    """Move the amplitude above `start` to that of another photograph, by `mix` of the way (Yang and Soatto 2020)."""
    return _towards(view, _donor(str(rng.choice(_DONORS))), rng.uniform(*mix), rng.uniform(*start))


def chroma_gain(view: F32, rng: Rng, start: Range, log_gain: Range) -> F32:
    """Amplify or damp the colour around grey above `start`, by exp(+-log_gain) at Nyquist; luminance stays."""
    grey = view.mean(axis=0)
    gain = rng.choice((-1.0, 1.0)) * rng.uniform(*log_gain) * ramp(view, rng.uniform(*start))
    return f32(grey + filtered(view - grey, np.exp(gain)))


def _towards(view: F32, amplitude: F32, mix: float, start: float) -> F32:
    """Move the log-amplitude above `start` by the share `mix` of the way to `amplitude`, of the shape of `rfft`."""
    band = mix * ramp(view, start, width=0.1)
    return filtered(view, np.exp(band * (np.log(amplitude + 1.0) - np.log(np.abs(rfft(view)) + 1.0))))


@lru_cache(maxsize=len(_DONORS))
def _donor(name: str) -> F32:
    """The amplitude of a photograph of `_DONORS`, of the shape of `rfft`; do not write to it."""
    photograph = np.array(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))
    return np.abs(rfft(channels_first(images.view(photograph, "resize"))))
