"""Natural view -> proxy view: a photograph, changed in the ways in which generated images differ from photographs.

Each family is a pure function `(view, rng, **ranges) -> view` on float32 [3, H, W] in 0..255. Views are square and
of any size. `ProxyConfig.families` holds the ranges. Lengths in a range are in pixels of the view and do not scale with
its size; frequencies are relative to Nyquist. Every family acts on the view that the encoder sees. `proxy` then
restores the mean colour, clips and rounds to 8 bits, as `natural` does for natural views, so that rounding gives no
proxy away.

Sources: Durall et al. 2020 (arXiv 2003.01826), Zhang et al. 2019 (1907.06515), Corvi et al. 2023 (2304.06408) and
Shiohara & Yamasaki 2022 (self-blended images). The strengths are ours. So are the families from `warp` to
`patch_resynthesis`.
"""

import hashlib
from collections.abc import Callable, Collection
from inspect import signature
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipflow_ray.config import ProxyConfig
from clipflow_ray.errors import ConfigError
from clipflow_ray.images import Pixels
from clipflow_ray.proxies import denoised, learned, spatial, spectral
from clipflow_ray.proxies.planes import F32, Rng, channels_first, irfft, quantized, rfft

Family = Callable[..., F32]

NATURAL: Final = "natural"
PAIRS: Final = "pairs"
_PAIR: Final = "+"
FAMILIES: Final[dict[str, Family]] = {
    family.__name__: family
    for family in (
        spectral.radial_gain_up,
        spectral.radial_gain_down,
        spectral.low_pass,
        spectral.slope,
        spectral.lattice_peaks,
        spectral.replicas,
        spectral.log_amplitude_field,
        spectral.phase_jitter,
        spectral.rotated_amplitude,
        spectral.amplitude_transplant,
        spectral.chroma_gain,
        spatial.resample,
        spatial.self_blend,
        spatial.texture_loss,
        spatial.tone,
        spatial.warp,
        spatial.defocus,
        spatial.halo,
        spatial.glow,
        spatial.chroma_bleed,
        spatial.median,
        spatial.palette,
        spatial.patch_bottleneck,
        spatial.patch_resynthesis,
        denoised.dct_shrinkage,
        denoised.total_variation,
        denoised.non_local_means,
        denoised.bilateral,
        learned.learned_transposed,
        learned.learned_nearest,
        learned.learned_shuffle,
    )
}


def check(config: ProxyConfig) -> None:
    """Raise ConfigError if `config` names no family, an unknown family, or ranges that a family does not take."""
    unknown = sorted(set(config.families) - set(FAMILIES))
    if unknown or not config.families:
        raise ConfigError(f"Unknown proxy families {unknown}; there are: {', '.join(FAMILIES)}. Name at least one.")
    for name, ranges in config.families.items():
        wanted = list(signature(FAMILIES[name]).parameters)[2:]
        if sorted(ranges) != sorted(wanted):
            raise ConfigError(f"Proxy family {name} takes the ranges {', '.join(wanted)}; given: {sorted(ranges)}.")
    low, high = config.paired_quality
    if not 1 <= low <= high <= 100:
        raise ConfigError(
            f"`paired_quality` is {low}, {high}: give the lowest and the highest quality, within 1 to 100."
        )


def generator(seed: int, row_id: str, *draw: int) -> Rng:
    """The random stream of one image and draw. It is the same on every machine and worker and in every batch."""
    digest = hashlib.blake2b(f"{seed}/{row_id}/{draw}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def proxy(view: Pixels, family: str, rng: Rng, config: ProxyConfig) -> Pixels:
    """One proxy of a natural view, both uint8 [H, W, 3]. Except for clipping, the mean colour stays."""
    source = channels_first(view)
    changed = FAMILIES[family](source, rng, **config.families[family])
    changed = changed + (source.mean(axis=(1, 2)) - changed.mean(axis=(1, 2)))[:, None, None]
    return np.ascontiguousarray(quantized(changed).transpose(1, 2, 0))


def label(family: str, rng: Rng, config: ProxyConfig) -> str:
    """The label of a proxy by `family`: the share `pairs` of them is by a second family as well, `first+second`."""
    others = sorted(set(config.families) - {family})
    if not config.pairs or not others or rng.random() >= config.pairs:
        return family
    return f"{family}{_PAIR}{rng.choice(others)}"


def drawn(view: Pixels, label: str, rng: Rng, config: ProxyConfig) -> Pixels:
    """The proxy of a natural view by the one or two families that `label` names, one after the other."""
    for family in label.split(_PAIR):
        view = proxy(view, family, rng, config)
    return view


def involves(labels: NDArray[np.str_], families: Collection[str]) -> NDArray[np.bool_]:
    """Whether each of the labels [N] names one of `families`, alone or in a pair."""
    kinds, place = np.unique(labels, return_inverse=True)
    named = np.array([not set(families).isdisjoint(str(kind).split(_PAIR)) for kind in kinds], bool)
    return named[place]


def merged(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """The labels [N], with each pair replaced by `pairs`."""
    return np.where(np.char.find(labels, _PAIR) < 0, labels, PAIRS)


def natural(view: Pixels) -> Pixels:
    """A natural view after the round trip of the proxies: to the spectrum and back, clip, 8-bit rounding."""
    source = channels_first(view)
    return np.ascontiguousarray(quantized(irfft(rfft(source), source.shape[1])).transpose(1, 2, 0))


def augmented(rgb: Pixels, rng: Rng, size: int) -> Pixels:
    """A second natural view of an image, uint8 [size, size, 3]: a random square, mirrored half the time.

    The side of the square is 80 to 100 % of the short side, and at least `size` pixels if the image has that many, so
    that the square is not enlarged. Enlarged natural views would teach the flow that softness is natural, but
    softness is what proxies and generated images have in common.
    """
    height, width = rgb.shape[:2]
    short = min(height, width)
    side = max(round(short * rng.uniform(0.8, 1.0)), min(short, size))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    image = Image.fromarray(rgb[top : top + side, left : left + side])
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
