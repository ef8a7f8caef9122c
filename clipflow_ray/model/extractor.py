"""Extractor: the interface that the flow needs of an encoder."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clipflow_ray.images import Pixels

F32 = NDArray[np.float32]
Images = Pixels | Sequence[Pixels]  # uint8, [H, W, 3] for each image


class Extractor(Protocol):
    """Images -> named features.

    `names` and `widths` list the features in the order of the flow's segments. `fingerprint` is 16 hex digits. It
    changes if any feature may change. `needs` names the input: the encoder's view, or all pixels of an image.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def needs(self) -> Literal["view", "pixels"]: ...

    def __call__(self, images: Images) -> dict[str, F32]:
        """float32 [N, width] for each named feature; a row depends on its own image alone. N is at least 1."""
        ...


def joined(features: dict[str, F32]) -> F32:
    """Concatenate the features in their order: float32 [N, sum of the widths]."""
    return np.concatenate(list(features.values()), axis=1)
