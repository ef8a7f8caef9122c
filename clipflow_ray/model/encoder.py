"""Frozen open_clip image tower: views -> embeddings, and a fingerprint that says which tower it was."""

import hashlib
import json
import math
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clipflow_ray.config import EncoderConfig
from clipflow_ray.errors import ConfigError, WeightsError
from clipflow_ray.images import VIEW_SIZE, Pixels
from clipflow_ray.model.weights import State, build_tower, load_weights

F32 = NDArray[np.float32]

_CPU_CHUNK: Final = 8  # activations of more images than this do not fit a core's cache


class Encoder:
    """The image tower in float32, in eval mode, on `device` (CUDA when there is one).

    `fingerprint` is 16 hex digits over weights, model name, preprocessing and view. Embeddings do not depend on
    batch-mates or device beyond float32 rounding: TF32 is switched off in this process. With `threads` above 1, that
    many on a CPU embed a few images each at a time, with one thread of torch each: on cores that do other work too
    they get further than one with as many threads of torch, which wait for the slowest at every step. What is one
    image is left to the caller's thread and torch's own.
    Raises WeightsError when the weights are missing or do not fit the model.
    """

    def __init__(
        self,
        config: EncoderConfig,
        device: str | None = None,
        features: Sequence[str] | None = None,
        threads: int = 1,
    ) -> None:
        self.config = config
        self.features = tuple(features or config.feature)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # cuDNN rounds the first layer to TF32 by default, so that a score would differ from the CPU's by 0.5 % and by
        # half of that with the number of batch-mates (H200).
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._threads = threads
        self._pool = _pool(threads) if threads > 1 else None
        weights = load_weights(config)
        tower = _loaded(config.model, weights.state)
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
        size = min(_CPU_CHUNK, math.ceil(len(views) / self._threads)) if self.device.type == "cpu" else len(views)
        parts = [views[at : at + size] for at in range(0, len(views), size)]
        each = self._pool.map if self._pool and len(parts) > 1 else map
        chunks = list(each(self._embedded, parts))
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in self.features}

    def _embedded(self, views: Pixels) -> dict[str, F32]:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(views)).to(self.device).permute(0, 3, 1, 2)
            planes = torch.empty(pixels.shape, device=self.device).copy_(pixels)  # the rest takes a third of the time
            outputs = self._forward(planes.div_(255.0).sub_(self._mean).div_(self._std))
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


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads with one thread of torch each. All start now: one that torch meets later gets what was set last."""
    number, started = torch.get_num_threads(), threading.Barrier(threads)

    def one() -> None:
        torch.get_num_threads()  # torch has met this thread now, and what it is told stays
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "encode", initializer=one)
    list(pool.map(abs, range(threads)))
    torch.set_num_threads(number)
    return pool


def _loaded(model: str, state: State) -> torch.nn.Module:
    """The tower with the mapped weights themselves as its parameters: the processes of a node share one copy."""
    try:
        with torch.device("meta"):  # random weights would be drawn, and take longer than all the rest
            tower = build_tower(model)
        tower.load_state_dict(state, strict=True, assign=True)
        if any(buffer.is_meta for buffer in tower.buffers()):  # some timm towers compute what they do not store
            tower = build_tower(model)
            tower.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"The weights do not fit {model!r}: {error}") from error
    return tower


def _block_indices(features: Sequence[str], tower: torch.nn.Module) -> list[int]:
    """Sorted indices, from 0, of the blocks that `features` name."""
    numbers = {int(found[1]) for name in features if (found := re.match(r"block(\d+)\.", name))}
    if numbers and not isinstance(tower, VisionTransformer):
        raise ConfigError("Only open_clip's own vision transformers have block features; use `projected`.")
    if numbers and max(numbers) > len(tower.transformer.resblocks):  # type: ignore[union-attr,arg-type]
        raise ConfigError(f"The tower has {len(tower.transformer.resblocks)} blocks.")  # type: ignore[union-attr,arg-type]
    return [number - 1 for number in sorted(numbers)]
