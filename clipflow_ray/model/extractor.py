"""Extractor: the interface that the flow needs of an encoder."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clipflow_ray.config import Segment
from clipflow_ray.images import Pixels

F32 = NDArray[np.float32]
Images = Pixels | Sequence[Pixels]  # uint8: for each image its packed views, or [H, W, 3]


class Extractor(Protocol):
    """Images -> named outputs.

    `names` and `widths` list the outputs. `fingerprint` is 16 hex digits. It changes if any output may change. `needs`
    names the input: the encoder's views, or all pixels of an image.
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
        """float32 [N, width] for each named output; a row depends on its own image alone. N is at least 1."""
        ...


def joined(outputs: dict[str, F32], segments: Sequence[Segment]) -> F32:
    """Concatenate the outputs of the segments in their order: float32 [N, sum of the widths]."""
    return np.concatenate([outputs[segment.output] for segment in segments], axis=1)
