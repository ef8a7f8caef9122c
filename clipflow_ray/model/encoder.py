"""Frozen open_clip image tower: views -> embeddings, and a fingerprint that identifies the encoder."""

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipflow_ray import compat
from clipflow_ray.config import WEIGHTS_INCLUDED, EncoderConfig
from clipflow_ray.errors import ConfigError, WeightsError
from clipflow_ray.images import Pixels
from clipflow_ray.model.extractor import F32, Images, joined
from clipflow_ray.model.weights import TowerRecord, TowerWeights, build_tower, load_weights

open_clip = compat.open_clip()

_CUDA_CHUNK: Final = 32
_ROWS: Final = 196
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoder:
    """Extractor that runs an image tower in eval mode on `device`. The default is CUDA if available, else the CPU.

    An embedding does not depend on the rest of its batch, because all forward passes have the same shape. On a CPU,
    each forward pass has one image, or a few if the tower makes few patches of one. It runs on one thread, and
    `threads` of them run at a time (default: torch's number). On CUDA, each forward pass has 32 images. If fewer images
    are left, the last one is repeated.

    The constructor switches TF32 off for the whole process, so that float32 embeddings differ between devices by
    rounding only. Raises WeightsError if the weights are missing or do not fit the model, and ConfigError if the tower
    lacks a feature.
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
        # By default, cuDNN rounds the first layer to TF32. On an H200, a score then differed from the CPU's by 0.5 %,
        # and by half of that between batch sizes.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._pool = _pool(threads or torch.get_num_threads()) if self.device.type == "cpu" else None
        weights = load_weights(config)
        self.view = weights.view
        self._chunk = _images_per_pass(weights) if self._pool else _CUDA_CHUNK
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
        each = self._pool.map if self._pool else map
        chunks = list(each(self._embedded, _padded(images, self._chunk)))
        return {name: np.concatenate([chunk[name] for chunk in chunks])[: len(images)] for name in self.names}

    def _embedded(self, views: Pixels) -> dict[str, F32]:
        with torch.inference_mode():
            pixels = torch.from_numpy(views).to(self.device).permute(0, 3, 1, 2)
            # Contiguous planes, because the arithmetic on them then takes a third of the time.
            planes = torch.empty(pixels.shape, device=self.device).copy_(pixels)
            planes = planes.div_(255.0).sub_(self._mean).div_(self._std).to(self._dtype)
            outputs = _features(self._tower, planes, self.names)
            return {name: outputs[name].float().cpu().numpy() for name in self.names}


def device_for(device: str | None) -> torch.device:
    """The named device. The default is CUDA if available, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def fingerprint(config: EncoderConfig, record: TowerRecord) -> str:
    """16 hex digits over weights, model, preprocessing, view and precision; the tensors are not needed.

    Checkpoints of format version 1 had no resize mode and no precision. Each of the two is left out if it has the value
    that was fixed then, so that the fingerprints of those checkpoints do not change.
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
    # The name of a folder or repository may change, and so may its content. The architecture identifies the model.
    model = record.architecture if config.model.startswith(WEIGHTS_INCLUDED) else config.model
    parts = {"weights_sha256": record.sha256, "model": model, "preprocess": preprocess}
    if config.precision != "float32":
        parts["precision"] = config.precision
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def feature_widths(config: EncoderConfig, record: TowerRecord, features: Sequence[str]) -> tuple[int, ...]:
    """The width of each feature, computed without the tensors. Raises ConfigError if the tower lacks a feature."""
    with torch.device("meta"), torch.inference_mode():
        tower = build_tower(record.architecture).eval()
        planes = torch.empty(1, 3, record.view.size, record.view.size)
        blocks = _block_numbers(features)
        if blocks:
            count = len(tower.forward_intermediates(planes, output_fmt="NCHW")["image_intermediates"])  # type: ignore[operator]
            if max(blocks) > count:
                raise ConfigError(f"The tower of {config.model!r} has {count} blocks; choose a block up to {count}.")
        if any(name.endswith(".cls") for name in features) and not _has_class_token(tower):
            raise ConfigError(f"The tower of {config.model!r} has no class token; use `blockN.mean` or `projected`.")
        outputs = _features(tower, planes, features)
        return tuple(outputs[name].shape[1] for name in features)


def _features(tower: nn.Module, planes: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Planes [N, 3, S, S] -> [N, D_i] for each name. `projected` has the dtype of the tower, the others are float32."""
    numbers = _block_numbers(names)
    if not numbers:
        return {"projected": tower(planes)}
    projected, classes = "projected" in names, any(name.endswith(".cls") for name in names)
    # open_clip's ResNet stops at the last requested block even if stop_early is False, so all blocks are requested.
    everything = isinstance(tower, open_clip.modified_resnet.ModifiedResNet)
    result = tower.forward_intermediates(  # type: ignore[operator]
        planes,
        indices=None if everything else [number - 1 for number in numbers],
        stop_early=not projected,
        intermediates_only=not projected,
        output_fmt="NLC" if isinstance(tower, open_clip.transformer.VisionTransformer) else "NCHW",
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
    """The sorted block numbers, from 1, of the features in `names`."""
    return sorted({int(found[1]) for name in names if (found := re.match(r"block(\d+)\.", name))})


def _has_class_token(tower: nn.Module) -> bool:
    return (
        isinstance(tower, open_clip.transformer.VisionTransformer)
        or getattr(getattr(tower, "trunk", None), "cls_token", None) is not None
    )


def _images_per_pass(record: TowerRecord) -> int:
    """Images in each forward pass on a CPU.

    With the 196 patches of a ViT-B/16 or more, one image is enough to keep a core busy. With fewer patches, reading the
    weights takes longer than multiplying by them: four images of 49 patches take half the time of four passes.
    """
    vision = record.architecture["vision_cfg"]
    if vision.get("timm_model_name") or not isinstance(vision.get("layers"), int):
        return 1
    patches = int(record.view.size // vision.get("patch_size", 16)) ** 2
    return min(8, max(1, _ROWS // patches))


def _padded(images: Images, size: int) -> list[Pixels]:
    """Split images into parts of `size`; the last part is filled up with copies of the last image."""
    images = [*images, *[images[-1]] * (-len(images) % size)]
    return [np.stack(images[at : at + size]) for at in range(0, len(images), size)]


def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of worker threads, each of which runs torch on one thread.

    At its first use in a thread, torch takes the number of threads that any thread set last. So all worker threads
    start here, before the number of this process is set back.
    """
    number, started = torch.get_num_threads(), threading.Barrier(threads)

    def one() -> None:
        torch.get_num_threads()  # the first use of torch in this thread; the number set next is kept
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "encode", initializer=one)
    list(pool.map(abs, range(threads)))
    torch.set_num_threads(number)
    return pool


def _loaded(model: str, weights: TowerWeights) -> nn.Module:
    """Build the tower on the memory-mapped weights, so that the processes of a node share one copy of them."""
    try:
        with torch.device("meta"):  # elsewhere, drawing random weights would take longer than all the rest
            tower = build_tower(weights.architecture)
        tower.load_state_dict(weights.state, strict=True, assign=True)
        if any(buffer.is_meta for buffer in tower.buffers()):  # some timm towers compute buffers that are not stored
            tower = build_tower(weights.architecture)
            tower.load_state_dict(weights.state, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"The weights do not fit {model!r}: {error}") from error
    return tower.eval().requires_grad_(False)
