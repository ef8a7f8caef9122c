"""Natural view -> proxy view: a photograph changed in ways in which generated images differ from photographs.

Each family is a pure function `(view, rng, **ranges) -> view` on float32 [3, H, W] in 0..255, whose ranges
come from `ProxyConfig.families`. All of them act on the view that the encoder sees, keep the mean colour,
and end in the same clip and 8-bit rounding that natural views pass through, so the pipeline is not the cue.
The operators follow the observations collected in Durall et al. 2020 (arXiv 2003.01826), Zhang et al. 2019
(1907.06515), Corvi et al. 2023 (2304.06408) and Shiohara & Yamasaki 2022 (self-blended images); their
strengths are our own. Frequencies are radii over Nyquist: 1.0 is half a cycle per pixel.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from clipflow_ray.config import ProxyConfig, Range
from clipflow_ray.errors import ConfigError
from clipflow_ray.images import VIEW_SIZE, Pixels

F32 = NDArray[np.float32]
C64 = NDArray[np.complex64]
Rng = np.random.Generator
Family = Callable[..., F32]

NATURAL: Final = "natural"
_KERNELS: Final = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def radial_gain_up(view: F32, rng: Rng, start: Range, log_gain: Range) -> F32:
    """Amplify frequencies above `start` by a ramp that reaches exp(log_gain) at Nyquist."""
    return _filtered(view, np.exp(rng.uniform(*log_gain) * _ramp(view, rng.uniform(*start))))


def radial_gain_down(view: F32, rng: Rng, start: Range, log_gain: Range) -> F32:
    """Damp frequencies above `start` by a ramp that reaches exp(-log_gain) at Nyquist."""
    return _filtered(view, np.exp(-rng.uniform(*log_gain) * _ramp(view, rng.uniform(*start))))


def low_pass(view: F32, rng: Rng, cutoff: Range, order: Range) -> F32:
    """Butterworth low-pass."""
    radius = _radius(view.shape[1]) / rng.uniform(*cutoff)
    return _filtered(view, 1.0 / np.sqrt(1.0 + radius ** (2.0 * rng.uniform(*order))))


def slope(view: F32, rng: Rng, start: Range, exponent: Range, min_magnitude: tuple[float]) -> F32:
    """Change the power-law slope above `start`: amplitude times (r / start) ** -exponent."""
    gamma = rng.uniform(*exponent)
    gamma = np.copysign(max(abs(gamma), min_magnitude[0]), gamma)
    begin = rng.uniform(*start)
    return _filtered(view, np.maximum(_radius(view.shape[1]) / begin, 1.0) ** -gamma)


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
    return view + _f32(rng.uniform(*amplitude) * pattern * np.minimum(contrast, 3.0))


def replicas(view: F32, rng: Rng, factors: tuple[float, ...], mix: Range) -> F32:
    """Replace part of the band above 1/factor by the spectral replicas of a strided down- and up-sampling."""
    size, factor = view.shape[1], int(rng.choice(factors))
    low = _filtered(view, (_radius(size) <= 1.0 / factor).astype(np.float32))[:, ::factor, ::factor]
    kind = rng.integers(3)
    if kind == 0:
        mean = low.mean(axis=(1, 2), keepdims=True)  # inserted as well, it would be a lattice of its own
        up = np.zeros_like(view)
        up[:, ::factor, ::factor] = (low - mean) * factor
        up += mean
    else:
        up = np.repeat(np.repeat(low, factor, axis=1), factor, axis=2)[:, :size, :size]
        if kind == 2:
            up = _f32(ndimage.uniform_filter(up, (0, factor, factor), mode="wrap"))
    band = _ramp(view, 1.0 / factor, width=0.1) * rng.uniform(*mix)
    spectrum = _spectrum(view)
    return _image(spectrum + band * (_spectrum(up) - spectrum), size)


def log_amplitude_field(view: F32, rng: Rng, sigma: Range, start: Range) -> F32:
    """Multiply the amplitude by exp of a smooth random field over the frequency plane, the same per channel."""
    size = view.shape[1]
    noise = rng.standard_normal((8, 8)).astype(np.float32)
    field = np.asarray(Image.fromarray(noise).resize((size // 2 + 1, size), Image.Resampling.BICUBIC))
    # Rows of a half-plane spectrum start at DC: unshifted, the field would jump there.
    field = np.fft.ifftshift(field, axes=0) / max(float(field.std()), 1e-6)
    return _filtered(view, np.exp(rng.uniform(*sigma) * field * _ramp(view, rng.uniform(*start), width=0.1)))


def phase_jitter(view: F32, rng: Rng, start: Range, sigma: Range) -> F32:
    """Add Gaussian noise of `sigma` radians to the phase above `start`, the same for all channels."""
    size = view.shape[1]
    noise = rng.standard_normal((size, size // 2 + 1)).astype(np.float32)
    # A real image needs antisymmetric phase on the two columns that are their own mirror.
    mirror = noise[:, (0, -1)]
    noise[:, (0, -1)] = (mirror - np.roll(mirror[::-1], 1, axis=0)) / np.sqrt(2.0)
    angle = rng.uniform(*sigma) * noise * _ramp(view, rng.uniform(*start), width=0.2)
    return _filtered(view, np.exp(1j * angle))


def resample(view: F32, rng: Rng, factor: Range) -> F32:
    """Shrink by `factor` and enlarge again, with kernels drawn independently."""
    size = view.shape[1]
    small = max(2, round(size / rng.uniform(*factor)))
    down, up = (_KERNELS[i] for i in rng.integers(len(_KERNELS), size=2))
    image = Image.fromarray(_quantized(view).transpose(1, 2, 0))
    return _channels_first(np.asarray(image.resize((small, small), down).resize((size, size), up)))


def self_blend(view: F32, rng: Rng, shift: Range, mix: Range) -> F32:
    """Blend the view with its own shifted, recoloured, sharpened or softened copy through a smooth mask."""
    size = view.shape[1]
    dx, dy = np.round(rng.uniform(*shift, size=2) * rng.choice((-1.0, 1.0), size=2)).astype(int)
    copy = np.roll(view, (dy, dx), axis=(1, 2))
    blurred = ndimage.uniform_filter(copy, (0, 3, 3))
    copy = blurred + rng.uniform(-0.2, 2.2) * (copy - blurred)
    mean = copy.mean(axis=(1, 2), keepdims=True)
    copy = mean + _f32(rng.uniform(0.85, 1.2, size=(3, 1, 1))) * (copy - mean)
    coarse = rng.random((5, 5)).astype(np.float32)
    mask = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    mask = rng.uniform(*mix) * np.clip((mask - mask.mean()) * 4.0 + 0.5, 0.0, 1.0)
    return _f32(view + mask * (copy - view))


def texture_loss(view: F32, rng: Rng, radius: Range, level: Range, mix: Range) -> F32:
    """Blend in a self-guided filter (He et al. 2010): detail weaker than `level` grey levels goes, edges stay."""
    size = 2 * round(rng.uniform(*radius)) + 1
    epsilon = np.float32(rng.uniform(*level) ** 2)
    mean = _box(view, size)
    variance = np.maximum(_box(view * view, size) - mean * mean, 0.0)
    keep = _f32(variance / (variance + epsilon))
    smooth = _box(keep, size) * view + _box(_f32(mean - keep * mean), size)
    return _f32(view + np.float32(rng.uniform(*mix)) * (smooth - view))


def tone(view: F32, rng: Rng, contrast: Range, saturation: Range, min_change: tuple[float]) -> F32:
    """Scale contrast around the mean by exp(contrast) and colour around grey by exp(saturation).

    Both draws grow together where the larger of them is below `min_change` in magnitude.
    """
    change = np.array([rng.uniform(*contrast), rng.uniform(*saturation)])
    change *= max(1.0, min_change[0] / max(float(np.abs(change).max()), 1e-6))
    grey = view.mean(axis=0)
    mean = grey.mean()
    colour = (view - grey) * np.float32(np.exp(change[1]))
    return _f32(mean + (grey - mean + colour) * np.float32(np.exp(change[0])))


FAMILIES: Final[dict[str, Family]] = {
    family.__name__: family
    for family in (
        radial_gain_up,
        radial_gain_down,
        low_pass,
        slope,
        lattice_peaks,
        replicas,
        log_amplitude_field,
        phase_jitter,
        resample,
        self_blend,
        texture_loss,
        tone,
    )
}


def check(config: ProxyConfig) -> None:
    """Raise ConfigError where `config` names no family, one that is not there, or other ranges than a family takes."""
    unknown = sorted(set(config.families) - set(FAMILIES))
    if unknown or not config.families:
        raise ConfigError(f"Unknown proxy families {unknown}; there are: {', '.join(FAMILIES)}. Name at least one.")
    for name, ranges in config.families.items():
        wanted = list(signature(FAMILIES[name]).parameters)[2:]
        if sorted(ranges) != sorted(wanted):
            raise ConfigError(f"Proxy family {name} takes the ranges {', '.join(wanted)}; given: {sorted(ranges)}.")


def generator(seed: int, row_id: str, *draw: int) -> Rng:
    """The random stream of one image and draw: the same on every machine, worker and batch."""
    digest = hashlib.blake2b(f"{seed}/{row_id}/{draw}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def proxy(view: Pixels, family: str, rng: Rng, config: ProxyConfig) -> Pixels:
    """One proxy of a natural view, uint8 [H, W, 3] to uint8 [H, W, 3]; mean colour kept up to clipping."""
    source = _channels_first(view)
    changed = FAMILIES[family](source, rng, **config.families[family])
    changed = changed + (source.mean(axis=(1, 2)) - changed.mean(axis=(1, 2)))[:, None, None]
    return np.ascontiguousarray(_quantized(changed).transpose(1, 2, 0))


def natural(view: Pixels) -> Pixels:
    """A natural view through the proxies' own round trip: spectrum and back, clip, 8-bit rounding."""
    source = _channels_first(view)
    return np.ascontiguousarray(_quantized(_image(_spectrum(source), source.shape[1])).transpose(1, 2, 0))


def augmented(rgb: Pixels, rng: Rng) -> Pixels:
    """A second natural view of an image, uint8 [224, 224, 3]: a random square, mirrored half the time.

    The square has 80 to 100 % of the short side and is never enlarged where the image has 224 pixels: an enlarged or
    recompressed natural would teach that softness is natural, which is what proxies and generators share.
    """
    height, width = rgb.shape[:2]
    short = min(height, width)
    side = max(round(short * rng.uniform(0.8, 1.0)), min(short, VIEW_SIZE))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    image = Image.fromarray(rgb[top : top + side, left : left + side])
    image = image.resize((VIEW_SIZE, VIEW_SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def _box(planes: F32, size: int) -> F32:
    """Mean over size x size neighbours, per channel."""
    return _f32(ndimage.uniform_filter(planes, (0, size, size)))


def _f32(values: NDArray[np.floating]) -> F32:
    return np.asarray(values, dtype=np.float32)


def _channels_first(view: Pixels) -> F32:
    return np.ascontiguousarray(view.transpose(2, 0, 1), dtype=np.float32)


def _quantized(view: F32) -> Pixels:
    return np.rint(np.clip(view, 0.0, 255.0)).astype(np.uint8)


def _spectrum(view: F32) -> C64:
    spectrum: C64 = fft.rfft2(view, axes=(1, 2))
    return spectrum


def _image(spectrum: C64, size: int) -> F32:
    return _f32(fft.irfft2(spectrum, s=(size, size), axes=(1, 2)))


def _filtered(view: F32, transfer: NDArray[np.inexact]) -> F32:
    """Multiply the half-plane spectrum of each channel by `transfer` [H, W // 2 + 1]; DC stays."""
    kind = np.complex64 if np.iscomplexobj(transfer) else np.float32
    transfer = transfer.astype(kind)
    transfer[0, 0] = 1.0
    return _image(_spectrum(view) * transfer, view.shape[1])


@lru_cache(maxsize=4)
def _radius(size: int) -> F32:
    """Radial frequency over Nyquist on the half plane, float32 [size, size // 2 + 1]; do not write to it."""
    return _f32(np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) * 2.0)


def _ramp(view: F32, start: float, width: float | None = None) -> F32:
    """0 below `start`, rising linearly to 1 at Nyquist, or over `width` where it is given."""
    reach = (1.0 - start) if width is None else width
    return _f32(np.clip((_radius(view.shape[1]) - start) / reach, 0.0, 1.0))
