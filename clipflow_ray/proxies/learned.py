"""Families that were learned: reconstructions by small auto-encoders that saw nothing but photographs.

Of another kind than the rest, and never among the defaults: what they change is not stated but fitted (see
`lab/autoencoders.py`). Their decoders end as those of image generators do (Aligned Datasets, arXiv 2410.11835, and
DDA take a generator's own; these are no generators).
"""

from functools import lru_cache
from typing import Any

import numpy as np

from clipflow_ray.config import Range
from clipflow_ray.proxies.planes import F32, Rng, f32

_GRID = 8  # pixels of the view to one of the latent


def learned_transposed(view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction by transposed convolutions."""
    return _reconstructed("transposed", view, rng, mix)


def learned_nearest(view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction by nearest neighbours and convolutions."""
    return _reconstructed("nearest", view, rng, mix)


def learned_shuffle(view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction by convolutions whose channels become pixels."""
    return _reconstructed("shuffle", view, rng, mix)


def _reconstructed(decoder: str, view: F32, rng: Rng, mix: Range) -> F32:
    """The latent's grid lies anywhere on the view, as it does on an image that was cropped."""
    import torch  # seconds, which tasks that make no such proxy need not spend

    shift = tuple(int(at) for at in rng.integers(_GRID, size=2))
    moved = np.roll(view, shift, axis=(1, 2)) / 255.0
    with torch.inference_mode():
        rebuilt = _autoencoder(decoder)(torch.from_numpy(f32(moved))[None])[0].numpy()
    rebuilt = np.roll(255.0 * rebuilt, (-shift[0], -shift[1]), axis=(1, 2))
    return f32(view + np.float32(rng.uniform(*mix)) * (rebuilt - view))


@lru_cache(maxsize=3)
def _autoencoder(decoder: Any) -> Any:
    from clipflow_ray.proxies.autoencoder import load

    return load(decoder)
