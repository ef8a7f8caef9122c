"""Frozen open_clip image tower: views -> embeddings, and a fingerprint that identifies the encoder."""

import copy
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipflow_ray import compat
from clipflow_ray.config import WEIGHTS_INCLUDED, EncoderConfig, Segment, ViewSpec, slots
from clipflow_ray.errors import ConfigError, WeightsError
from clipflow_ray.images import Pixels, by_size
from clipflow_ray.model.extractor import F32, Images
from clipflow_ray.model.weights import TowerRecord, TowerWeights, build_tower, load_weights

open_clip = compat.open_clip()
_VisionTransformer: Final = open_clip.transformer.VisionTransformer

_CUDA_CHUNK: Final = 32
_ROWS: Final = 196
_PROJECTED: Final = Segment(feature="projected")
_MIDDLE: Final = 0.5
_LATE: Final = 0.92
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoder:
    """Extractor that runs an image tower in eval mode on `device`. The default is CUDA if available, else the CPU.

    `segments` name its outputs. Their sizes may be left out, which stands for the tower's own size. By default the
    output is `projected`. At another size than the tower's own, the positional embeddings are interpolated.

    An embedding does not depend on the rest of its batch, because all forward passes of a size have the same shape. On
    a CPU, each forward pass has one image, or a few if the tower makes few patches of one. It runs on one thread, and
    `threads` of them run at a time (default: torch's number). On CUDA, each forward pass has 32 images. If fewer images
    are left, the last one is repeated.

    The constructor switches TF32 off for the whole process, so that float32 embeddings differ between devices by
    rounding only. Raises WeightsError if the weights are missing or do not fit the model, and ConfigError if the tower
    lacks a feature or cannot take a size.
    """

    needs: Final[Literal["view"]] = "view"

    def __init__(
        self,
        config: EncoderConfig,
        segments: Sequence[Segment] = (_PROJECTED,),
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.config = config
        self.device = device_for(device)
        # By default, cuDNN rounds the first layer to TF32. On an H200, a score then differed from the CPU's by 0.5 %,
        # and by half of that between batch sizes.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._pool = _pool(threads or torch.get_num_threads()) if self.device.type == "cpu" else None
        weights = load_weights(config)
        self.segments = resolved(segments, config, weights)
        self.view = view_of(self.segments, weights)
        found = widths_of(self.segments, config, weights)
        widths = {segment.output: width for segment, width in zip(self.segments, found, strict=True)}
        self.names, self.widths = tuple(widths), tuple(widths.values())
        self.fingerprint = fingerprint(config, weights, self.view.sizes)
        self._dtype = _DTYPES[config.precision]
        own = _loaded(config.model, weights)
        self._chunks = {
            size: _images_per_pass(weights, size) if self._pool else _CUDA_CHUNK for size in self.view.sizes
        }
        towers = {size: _at_size(own, weights, size) for size in self.view.sizes}  # all before a change of dtype
        self._towers = {size: tower.to(self.device, self._dtype) for size, tower in towers.items()}
        self._mean = torch.tensor(self.view.mean, device=self.device)[:, None, None]
        self._std = torch.tensor(self.view.std, device=self.device)[:, None, None]

    def __call__(self, images: Images) -> dict[str, F32]:
        """uint8 [N, view.bytes], packed by `images.views` -> float32 [N, D_i] for each output; N is at least 1."""
        outputs: dict[str, F32] = {}
        for size, views in zip(self.view.sizes, by_size(np.asarray(images), self.view.sizes), strict=True):
            outputs |= self.encode(views, [segment for segment in self.segments if segment.size == size])
        return {name: outputs[name] for name in self.names}

    def encode(self, views: Pixels, segments: Sequence[Segment]) -> dict[str, F32]:
        """uint8 [N, S, S, 3] -> float32 [N, D_i] for the output of each of `segments`, which have the size S."""
        size = views.shape[1]
        names = tuple(dict.fromkeys(segment.feature for segment in segments))
        each = self._pool.map if self._pool else map
        chunks = list(each(partial(self._encoded, size, names), _padded(views, self._chunks[size])))
        return {
            segment.output: np.concatenate([chunk[segment.feature] for chunk in chunks])[: len(views)]
            for segment in segments
        }

    def _encoded(self, size: int, names: Sequence[str], views: Pixels) -> dict[str, F32]:
        with torch.inference_mode():
            pixels = torch.from_numpy(views).to(self.device).permute(0, 3, 1, 2)
            # Contiguous planes, because the arithmetic on them then takes a third of the time.
            planes = torch.empty(pixels.shape, device=self.device).copy_(pixels)
            planes = planes.div_(255.0).sub_(self._mean).div_(self._std).to(self._dtype)
            outputs = _features(self._towers[size], planes, names)
            return {name: outputs[name].float().cpu().numpy() for name in names}


def device_for(device: str | None) -> torch.device:
    """The named device. The default is CUDA if available, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def resolved(segments: Sequence[Segment], config: EncoderConfig, record: TowerRecord) -> tuple[Segment, ...]:
    """The segments with their sizes filled in; if there are none, three that the depth of the tower decides.

    Those three are the mean of the patches at half the depth, plain, at the tower's own size, and the class token at
    0.92 of the depth, paired, at that size and at twice that size. The rule is from a comparison of the features of a
    ViT-B/16 on development sets with AI-generated images; see docs/method.md. A tower without a class token gives the
    mean instead, and a tower that takes no other size gives its own size only.
    """
    (own,) = record.view.sizes
    if segments:
        return tuple(each if each.size else each.model_copy(update={"size": own}) for each in segments)
    with torch.device("meta"), torch.inference_mode():
        tower = build_tower(record.architecture).eval()
        depth = _depth(tower, own)
    late = "cls" if _has_class_token(tower) else "mean"
    sizes = (own, 2 * own) if _takes_sizes(tower) else (own,)
    return (
        Segment(feature=f"block{max(1, round(_MIDDLE * depth))}.mean", size=own),
        *(Segment(feature=f"block{round(_LATE * depth)}.{late}", size=size, training="paired") for size in sizes),
    )


def view_of(segments: Sequence[Segment], record: TowerRecord) -> ViewSpec:
    """The views that resolved segments need: each size once, the smallest first."""
    sizes = tuple(size for size, _ in slots([each.model_copy(update={"training": "plain"}) for each in segments]))
    return record.view.model_copy(update={"sizes": sizes})


def fingerprint(config: EncoderConfig, record: TowerRecord, sizes: Sequence[int]) -> str:
    """16 hex digits over weights, model, preprocessing, sizes of the views and precision; the tensors are not needed.

    Checkpoints of format version 1 had no resize mode, no precision, and no size but the tower's own. Each of these is
    left out if it has the value that was fixed then, so that the fingerprints of those checkpoints do not change.
    """
    view = record.view
    (own,) = view.sizes
    preprocess: dict[str, Any] = {
        "size": own,
        "mean": [round(value, 8) for value in view.mean],
        "std": [round(value, 8) for value in view.std],
        "interpolation": view.interpolation,
        "view": view.kind,
    }
    if view.resize_mode != "shortest":
        preprocess["resize_mode"] = view.resize_mode
    # The name of a folder or repository may change, and so may its content. The architecture identifies the model.
    model = record.architecture if config.model.startswith(WEIGHTS_INCLUDED) else config.model
    parts: dict[str, Any] = {"weights_sha256": record.sha256, "model": model, "preprocess": preprocess}
    if config.precision != "float32":
        parts["precision"] = config.precision
    if set(sizes) != {own}:
        parts["sizes"] = sorted(sizes)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def widths_of(segments: Sequence[Segment], config: EncoderConfig, record: TowerRecord) -> tuple[int, ...]:
    """The width of each resolved segment, computed without the tensors.

    Raises ConfigError if the tower lacks a feature or cannot take a size.
    """
    found: dict[str, int] = {}
    (own,) = record.view.sizes
    with torch.device("meta"), torch.inference_mode():
        tower = build_tower(record.architecture).eval()
        depth = _depth(tower, own) if _block_numbers([each.feature for each in segments]) else 0
        for each in segments:
            if max(_block_numbers([each.feature]), default=0) > depth:
                raise ConfigError(
                    f"The tower of {config.model!r} has {depth} blocks; choose one up to {depth} for {each.feature!r}."
                )
            if each.feature.endswith(".cls") and not _has_class_token(tower):
                raise ConfigError(
                    f"The tower of {config.model!r} has no class token; use `blockN.mean` or `projected`."
                )
            if each.size != own and not _takes_sizes(tower):
                raise ConfigError(f"The tower of {config.model!r} takes views of {own} pixels, not of {each.size}.")
            if each.size != own and (each.size or 0) % _patch(record.architecture, tower):
                raise ConfigError(
                    f"The tower of {config.model!r} cannot take views of {each.size} pixels; choose a multiple of its "
                    f"patches of {_patch(record.architecture, tower)} pixels."
                )
            # The width of a feature does not depend on the size of the view.
            if each.feature not in found:
                outputs = _features(tower, torch.empty(1, 3, own, own), [each.feature])
                found[each.feature] = outputs[each.feature].shape[1]
    return tuple(found[each.feature] for each in segments)


def _at_size(tower: nn.Module, record: TowerRecord, size: int) -> nn.Module:
    """The tower for views of `size` pixels. It shares all tensors but the positional embeddings with `tower`."""
    (own,) = record.view.sizes
    if size == own:
        return tower
    resized = copy.deepcopy(tower, {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())})
    if isinstance(resized, _VisionTransformer):
        from timm.layers.pos_embed import resample_abs_pos_embed  # imported after `compat.open_clip`, which is faster

        grid = size // _patch(record.architecture, tower)
        embedding = resample_abs_pos_embed(resized.positional_embedding.detach()[None], [grid, grid])[0]
        resized.positional_embedding = nn.Parameter(embedding, requires_grad=False)
        resized.image_size, resized.grid_size = (size, size), (grid, grid)
    else:
        trunk: Any = resized.trunk
        trunk.set_input_size(img_size=size)
    return resized


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
        output_fmt="NLC" if isinstance(tower, _VisionTransformer) else "NCHW",
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


def _depth(tower: nn.Module, size: int) -> int:
    """The number of blocks."""
    planes = torch.empty(1, 3, size, size)
    return len(tower.forward_intermediates(planes, output_fmt="NCHW")["image_intermediates"])  # type: ignore[operator]


def _patch(architecture: dict[str, Any], tower: nn.Module) -> int:
    """Side of a patch in pixels."""
    embed = getattr(getattr(tower, "trunk", None), "patch_embed", None)
    return int(embed.patch_size[0] if embed else architecture["vision_cfg"].get("patch_size", 16))


def _takes_sizes(tower: nn.Module) -> bool:
    """Whether the tower can take views of other sizes than its own."""
    return isinstance(tower, _VisionTransformer) or hasattr(getattr(tower, "trunk", None), "set_input_size")


def _has_class_token(tower: nn.Module) -> bool:
    return (
        isinstance(tower, _VisionTransformer) or getattr(getattr(tower, "trunk", None), "cls_token", None) is not None
    )


def _images_per_pass(record: TowerRecord, size: int) -> int:
    """Images of views of `size` pixels in each forward pass on a CPU.

    With the 196 patches of a ViT-B/16 or more, one image is enough to keep a core busy. With fewer patches, reading the
    weights takes longer than multiplying by them: four images of 49 patches take half the time of four passes.
    """
    vision = record.architecture["vision_cfg"]
    if vision.get("timm_model_name") or not isinstance(vision.get("layers"), int):
        return 1
    patches = int(size // vision.get("patch_size", 16)) ** 2
    return min(8, max(1, _ROWS // patches))


def _padded(views: Pixels, count: int) -> list[Pixels]:
    """Split views into parts of `count`; the last part is filled up with copies of the last view."""
    parts = [views[at : at + count] for at in range(0, len(views), count)]
    missing = -len(views) % count
    parts[-1] = np.concatenate([parts[-1], *[parts[-1][-1:]] * missing])
    return [np.array(part, order="C") for part in parts]  # writable copies, or torch would warn


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
