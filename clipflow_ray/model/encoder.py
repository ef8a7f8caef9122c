"""Frozen open_clip image tower: views -> embeddings, and a fingerprint that says which tower it was."""

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clipflow_ray.config import EncoderConfig
from clipflow_ray.errors import ConfigError, WeightsError
from clipflow_ray.images import VIEW_SIZE, Pixels
from clipflow_ray.model.weights import build_tower, load_weights

F32 = NDArray[np.float32]


class Encoder:
    """The image tower in float32, in eval mode, on `device` (CUDA when there is one).

    `fingerprint` is 16 hex digits over weights, model name, preprocessing and view. Embeddings do not depend on
    batch-mates beyond float rounding. Raises WeightsError when the weights are missing or do not fit the model.
    """

    def __init__(self, config: EncoderConfig, device: str | None = None, features: Sequence[str] | None = None) -> None:
        self.config = config
        self.features = tuple(features or config.feature)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        weights = load_weights(config)
        tower = build_tower(config.model)
        try:
            tower.load_state_dict(weights.state, strict=True)
        except RuntimeError as error:
            raise WeightsError(f"The weights do not fit {config.model!r}: {error}") from error
        self._tower = tower.eval().requires_grad_(False).to(self.device)
        self._mean = torch.tensor(weights.mean, device=self.device)[:, None, None]
        self._std = torch.tensor(weights.std, device=self.device)[:, None, None]
        self._blocks = _block_indices(self.features, tower)
        record = {
            "weights_sha256": weights.sha256,
            "model": config.model,
            "preprocess": {
                "size": VIEW_SIZE,
                "mean": [round(value, 8) for value in weights.mean],
                "std": [round(value, 8) for value in weights.std],
                "interpolation": "bicubic",
                "view": config.view,
            },
        }
        self.fingerprint = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    def embed(self, views: Pixels) -> F32:
        """uint8 [N, 224, 224, 3] -> float32 [N, D]: the named features, concatenated in order."""
        return np.concatenate(list(self.embed_each(views).values()), axis=1)

    def embed_each(self, views: Pixels) -> dict[str, F32]:
        """uint8 [N, 224, 224, 3] -> float32 [N, D_i] for each named feature; N is at least 1."""
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(views)).to(self.device).permute(0, 3, 1, 2)
            outputs = self._forward((pixels.float() / 255.0 - self._mean) / self._std)
            return {name: outputs[name].float().cpu().numpy() for name in self.features}

    def _forward(self, pixels: Tensor) -> dict[str, Tensor]:
        if not self._blocks:
            return {"projected": self._tower(pixels)}
        result = self._tower.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=self._blocks,
            stop_early="projected" not in self.features,
            intermediates_only="projected" not in self.features,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        outputs: dict[str, Tensor] = {}
        if "projected" in self.features:
            outputs["projected"] = result["image_features"]
        for at, index in enumerate(self._blocks):
            outputs[f"block{index + 1}.cls"] = result["image_intermediates_prefix"][at][:, 0]
            outputs[f"block{index + 1}.mean"] = result["image_intermediates"][at].mean(dim=1)
        return outputs


def _block_indices(features: Sequence[str], tower: torch.nn.Module) -> list[int]:
    """Sorted indices, from 0, of the blocks that `features` name."""
    numbers = {int(found[1]) for name in features if (found := re.match(r"block(\d+)\.", name))}
    if numbers and not isinstance(tower, VisionTransformer):
        raise ConfigError("Only open_clip's own vision transformers have block features; use `projected`.")
    if numbers and max(numbers) > len(tower.transformer.resblocks):  # type: ignore[union-attr,arg-type]
        raise ConfigError(f"The tower has {len(tower.transformer.resblocks)} blocks.")  # type: ignore[union-attr,arg-type]
    return [number - 1 for number in sorted(numbers)]
