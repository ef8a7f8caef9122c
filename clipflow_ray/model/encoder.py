"""Frozen open_clip image tower: views -> embeddings, and a fingerprint that says which tower it was."""

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

import numpy as np
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clipflow_ray.config import WEIGHTS_INCLUDED, EncoderConfig
from clipflow_ray.errors import ConfigError, WeightsError
from clipflow_ray.images import Pixels
from clipflow_ray.model.extractor import F32, Images, joined
from clipflow_ray.model.weights import TowerRecord, TowerWeights, build_tower, load_weights

_CUDA_CHUNK: Final = 32
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoder:
    """The image tower in eval mode on `device` (CUDA if there is one): the first Extractor.

    An embedding does not depend on batch-mates or on how many there are, because the kernels always see one shape. On
    a CPU, each image is a forward pass of its own on one thread; `threads` of them run at a time (torch's number by
    default). On CUDA, a forward pass always has 32 images; the last ones repeat if there are fewer.

    Float32 embeddings do not depend on the device beyond rounding: TF32 is switched off in this process. Raises
    WeightsError if the weights are missing or do not fit the model, ConfigError if the tower lacks a feature.
    """

    needs: Final[Literal["view"]] = "view"

    def __init__(
        self,
        config: EncoderConfig,
        device: str | None = None,
        features: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.config = config
        self.names = tuple(features or config.feature)
        self.device = device_for(device)
        # cuDNN rounds the first layer to TF32 by default, so that a score would differ from the CPU's by 0.5 % and by
        # half of that with the number of batch-mates (H200).
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._pool = _pool(threads or torch.get_num_threads()) if self.device.type == "cpu" else None
        weights = load_weights(config)
        self.view = weights.view
        self.widths = feature_widths(config, weights, self.names)
        self.fingerprint = fingerprint(config, weights)
        self._dtype = _DTYPES[config.precision]
        self._tower = _loaded(config.model, weights).to(self.device, self._dtype)
        self._mean = torch.tensor(self.view.mean, device=self.device)[:, None, None]
        self._std = torch.tensor(self.view.std, device=self.device)[:, None, None]

    def embed(self, views: Images) -> F32:
        """uint8 [N, S, S, 3] -> float32 [N, D]: the named features, concatenated in order."""
        return joined(self(views))

    def __call__(self, images: Images) -> dict[str, F32]:
        """uint8 [N, S, S, 3] -> float32 [N, D_i] for each named feature; S is `view.size` and N at least 1."""
        if self._pool:
            chunks = list(self._pool.map(self._embedded, (image[None] for image in images)))
        else:
            chunks = [self._embedded(part) for part in _padded(np.asarray(images), _CUDA_CHUNK)]
        return {name: np.concatenate([chunk[name] for chunk in chunks])[: len(images)] for name in self.names}

    def _embedded(self, views: Pixels) -> dict[str, F32]:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(views)).to(self.device).permute(0, 3, 1, 2)
            planes = torch.empty(pixels.shape, device=self.device).copy_(pixels)  # the rest takes a third of the time
            planes = planes.div_(255.0).sub_(self._mean).div_(self._std).to(self._dtype)
            outputs = _features(self._tower, planes, self.names)
            return {name: outputs[name].float().cpu().numpy() for name in self.names}


def device_for(device: str | None) -> torch.device:
    """The named device, else CUDA if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def fingerprint(config: EncoderConfig, record: TowerRecord) -> str:
    """16 hex digits over weights, model, preprocessing, view and precision; the tensors are not needed.

    What version 1 of the checkpoints could not choose is left out where it has the value of that time, so that their
    fingerprints stay.
    """
    view = record.view
    preprocess: dict[str, Any] = {
        "size": view.size,
        "mean": [round(value, 8) for value in view.mean],
        "std": [round(value, 8) for value in view.std],
        "interpolation": view.interpolation,
        "view": view.kind,
    }
    if view.resize_mode != "shortest":
        preprocess["resize_mode"] = view.resize_mode
    # A folder or repository may be renamed or change; what it built is known by its architecture.
    model = record.architecture if config.model.startswith(WEIGHTS_INCLUDED) else config.model
    parts = {"weights_sha256": record.sha256, "model": model, "preprocess": preprocess}
    if config.precision != "float32":
        parts["precision"] = config.precision
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def feature_widths(config: EncoderConfig, record: TowerRecord, features: Sequence[str]) -> tuple[int, ...]:
    """The width of each feature, found without the tensors; raises ConfigError if the tower lacks one of them."""
    with torch.device("meta"), torch.inference_mode():
        tower = build_tower(record.architecture).eval()
        planes = torch.empty(1, 3, record.view.size, record.view.size)
        blocks = _block_numbers(features)
        if blocks:
            count = len(tower.forward_intermediates(planes, output_fmt="NCHW")["image_intermediates"])  # type: ignore[operator]
            if max(blocks) > count:
                raise ConfigError(
                    f"The tower of {config.model!r} has {count} blocks; {max(blocks)} is not one of them."
                )
        if any(name.endswith(".cls") for name in features) and not _has_class_token(tower):
            raise ConfigError(f"The tower of {config.model!r} has no class token; use `blockN.mean` or `projected`.")
        outputs = _features(tower, planes, features)
        return tuple(outputs[name].shape[1] for name in features)


def _features(tower: nn.Module, planes: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """[N, 3, S, S] -> [N, D_i] for each name; the projected feature in the tower's precision, the others float32."""
    numbers = _block_numbers(names)
    if not numbers:
        return {"projected": tower(planes)}
    projected, classes = "projected" in names, any(name.endswith(".cls") for name in names)
    # Told to go on to the end, open_clip's ResNet stops at the last block that is asked for. So it is asked for all.
    everything = isinstance(tower, ModifiedResNet)
    result = tower.forward_intermediates(  # type: ignore[operator]
        planes,
        indices=None if everything else [number - 1 for number in numbers],
        stop_early=not projected,
        intermediates_only=not projected,
        output_fmt="NLC" if isinstance(tower, VisionTransformer) else "NCHW",
        output_extra_tokens=classes,
    )
    outputs: dict[str, Tensor] = {"projected": result["image_features"]} if projected else {}
    for at, number in enumerate(numbers):
        at = number - 1 if everything else at
        tokens = result["image_intermediates"][at].float()
        outputs[f"block{number}.mean"] = tokens.mean(dim=1 if tokens.ndim == 3 else (2, 3))
        if classes:
            outputs[f"block{number}.cls"] = result["image_intermediates_prefix"][at][:, 0]
    return outputs


def _block_numbers(names: Sequence[str]) -> list[int]:
    """Sorted numbers, from 1, of the blocks that `names` name."""
    return sorted({int(found[1]) for name in names if (found := re.match(r"block(\d+)\.", name))})


def _has_class_token(tower: nn.Module) -> bool:
    return isinstance(tower, VisionTransformer) or getattr(getattr(tower, "trunk", None), "cls_token", None) is not None


def _padded(views: Pixels, size: int) -> list[Pixels]:
    """`views` in parts of `size`; the last view fills the last part."""
    missing = -len(views) % size
    views = np.concatenate([views, np.repeat(views[-1:], missing, axis=0)])
    return np.split(views, len(views) // size)


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


def _loaded(model: str, weights: TowerWeights) -> nn.Module:
    """The tower with the mapped weights themselves as its parameters: the processes of a node share one copy."""
    try:
        with torch.device("meta"):  # random weights would be drawn, and take longer than all the rest
            tower = build_tower(weights.architecture)
        tower.load_state_dict(weights.state, strict=True, assign=True)
        if any(buffer.is_meta for buffer in tower.buffers()):  # some timm towers compute what they do not store
            tower = build_tower(weights.architecture)
            tower.load_state_dict(weights.state, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"The weights do not fit {model!r}: {error}") from error
    return tower.eval().requires_grad_(False)
