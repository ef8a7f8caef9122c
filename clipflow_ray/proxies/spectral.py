"""Families that act on the spectrum. Frequencies are radii relative to Nyquist: 1.0 is half a cycle per pixel."""

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

# Photographs that scikit-image ships. With donors from the input, a proxy would depend on other images as well.
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
    """Change the power-law slope above `start`: multiply the amplitude by (r / start) ** -exponent."""
    gamma = rng.uniform(*exponent)
    gamma = np.copysign(max(abs(gamma), min_magnitude[0]), gamma)
    begin = rng.uniform(*start)
    return filtered(view, np.maximum(radii(view.shape[1]) / begin, 1.0) ** -gamma)


def lattice_peaks(view: F32, rng: Rng, periods: tuple[float, ...], amplitude: Range) -> F32:
    """Add a pattern that repeats after one of `periods`, in pixels, as strided up-sampling leaves it.

    Local contrast modulates the pattern. Its standard deviation is `amplitude` grey levels.
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
    """Move the band above 1 / factor, by `mix`, to the spectral replicas of strided down- and up-sampling."""
    size, factor = view.shape[1], int(rng.choice(factors))
    low = filtered(view, (radii(size) <= 1.0 / factor).astype(np.float32))[:, ::factor, ::factor]
    kind = rng.integers(3)
    if kind == 0:
        mean = low.mean(axis=(1, 2), keepdims=True)  # zeros between copies of the mean would add a lattice
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
    """Multiply the amplitude by exp of a smooth random field over frequency, the same for all channels."""
    size = view.shape[1]
    noise = rng.standard_normal((8, 8)).astype(np.float32)
    field = np.asarray(Image.fromarray(noise).resize((size // 2 + 1, size), Image.Resampling.BICUBIC))
    # The rows of a half-plane spectrum start at DC. Without the shift, the field would jump there.
    field = np.fft.ifftshift(field, axes=0) / max(float(field.std()), 1e-6)
    return filtered(view, np.exp(rng.uniform(*sigma) * field * ramp(view, rng.uniform(*start), width=0.1)))


def phase_jitter(view: F32, rng: Rng, start: Range, sigma: Range) -> F32:
    """Add Gaussian noise of `sigma` radians to the phase above `start`, the same for all channels."""
    size = view.shape[1]
    noise = rng.standard_normal((size, size // 2 + 1)).astype(np.float32)
    # In the spectrum of a real image, the first and the last column mirror themselves: their phase is antisymmetric.
    mirror = noise[:, (0, -1)]
    noise[:, (0, -1)] = (mirror - np.roll(mirror[::-1], 1, axis=0)) / np.sqrt(2.0)
    angle = rng.uniform(*sigma) * noise * ramp(view, rng.uniform(*start), width=0.2)
    return filtered(view, np.exp(1j * angle))


def rotated_amplitude(view: F32, rng: Rng, start: Range, mix: Range) -> F32:
    """Move the amplitude above `start` towards that of the transposed view: the power at each radius stays."""
    return _towards(view, np.abs(rfft(view.transpose(0, 2, 1))), rng.uniform(*mix), rng.uniform(*start))


def amplitude_transplant(view: F32, rng: Rng, start: Range, mix: Range) -> F32:
    """Move the amplitude above `start` towards that of another photograph, by `mix` (Yang and Soatto 2020)."""
    donors = _donors(view.shape[1])
    return _towards(view, donors[rng.choice(len(donors))], rng.uniform(*mix), rng.uniform(*start))


def chroma_gain(view: F32, rng: Rng, start: Range, log_gain: Range) -> F32:
    """Amplify or damp the colour above `start`, by exp(+-log_gain) at Nyquist; luminance stays."""
    grey = view.mean(axis=0)
    gain = rng.choice((-1.0, 1.0)) * rng.uniform(*log_gain) * ramp(view, rng.uniform(*start))
    return f32(grey + filtered(view - grey, np.exp(gain)))


def _towards(view: F32, amplitude: F32, mix: float, start: float) -> F32:
    """Move the log-amplitude above `start` by the share `mix` of the way to that of `amplitude`, shaped as `rfft`."""
    band = mix * ramp(view, start, width=0.1)
    return filtered(view, np.exp(band * (np.log(amplitude + 1.0) - np.log(np.abs(rfft(view)) + 1.0))))


@lru_cache(maxsize=4)
def _donors(size: int) -> tuple[F32, ...]:
    """The amplitudes of the photographs of `_DONORS` at `size` pixels a side, shaped as `rfft`. Do not write to them.

    Photographs with a short side below `size` are left out, because enlarging empties the high frequencies. If all of
    them are too small, none is left out.
    """
    photographs = [np.array(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")) for name in _DONORS]
    large = [photograph for photograph in photographs if min(photograph.shape[:2]) >= size]
    return tuple(np.abs(rfft(channels_first(_square(photograph, size)))) for photograph in large or photographs)


def _square(photograph: images.Pixels, size: int) -> images.Pixels:
    """The centre of a photograph whose short side is resized to `size` pixels, uint8 [size, size, 3]."""
    height, width = (size * side // min(photograph.shape[:2]) for side in photograph.shape[:2])
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return images.resized(photograph, width, height)[top : top + size, left : left + size]
