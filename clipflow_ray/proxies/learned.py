"""Learned families: reconstructions by small auto-encoders that were trained on photographs alone.

Unlike the other families, these are learned (see `lab/autoencoders.py`), and none is a default. Their decoders end in
the same layers as those of image generators. Aligned Datasets (arXiv 2410.11835) and DDA use the auto-encoder of a
generator instead; these auto-encoders belong to no generator.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from clipflow_ray.config import Range
from clipflow_ray.proxies.planes import F32, Rng, extended, f32

_GRID = 8  # pixels of the view, in each direction, for one pixel of the latent


def learned_transposed(view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction by transposed convolutions."""
    return _reconstructed("transposed", view, rng, mix)


def learned_nearest(view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction by nearest neighbours and convolutions."""
    return _reconstructed("nearest", view, rng, mix)


def learned_shuffle(view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction by convolutions and a pixel shuffle."""
    return _reconstructed("shuffle", view, rng, mix)


def _reconstructed(decoder: str, view: F32, rng: Rng, mix: Range) -> F32:
    """Blend in a reconstruction with the latent grid at a random offset, as in a cropped image."""
    import torch  # deferred: the import takes seconds, and most tasks draw no learned family

    shift = tuple(int(at) for at in rng.integers(_GRID, size=2))
    moved = np.roll(extended(view, _GRID), shift, axis=(1, 2)) / 255.0
    with torch.inference_mode():
        rebuilt = _autoencoder(decoder)(torch.from_numpy(f32(moved))[None])[0].numpy()
    size = view.shape[1]
    rebuilt = np.roll(255.0 * rebuilt, (-shift[0], -shift[1]), axis=(1, 2))[:, :size, :size]
    return f32(view + np.float32(rng.uniform(*mix)) * (rebuilt - view))


@lru_cache(maxsize=3)
def _autoencoder(decoder: Any) -> Any:
    from clipflow_ray.proxies.autoencoder import load

    return load(decoder)
