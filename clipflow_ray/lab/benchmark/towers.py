"""The encoder of each recipe over that of `default`."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field
from safetensors.torch import save_file

from clipflow_ray import compat
from clipflow_ray.config import DEFAULT_RECIPE, RECIPES, EncoderConfig, TrainConfig, load_yaml
from clipflow_ray.lab.benchmark.common import Benchmark, bare_loop, interleaved
from clipflow_ray.model.encoder import Encoder

open_clip = compat.open_clip()

_TEXT: Final = {"context_length": 4, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
_PREPROCESS: Final = ("mean", "std", "interpolation", "resize_mode")


class TowersBenchmark(Benchmark):
    """The encoder of the slowest recipe over that of `default`."""

    images: int = Field(description="Images of one measurement.")
    recipes: dict[str, Benchmark] = Field(description="Each recipe's encoder over that of `default`, which is `bare`.")


def encoders_of_recipes(images: int, rounds: int) -> TowersBenchmark:
    """Images per second of each recipe's encoder over those of the recipe `default`, on one batch of ready views.

    All segments of a recipe are encoded. The weights are random, because the time does not depend on them.
    """
    configs = {name: load_yaml(TrainConfig, path, {"output": "unused"}) for name, path in RECIPES.items()}
    own = configs.pop(DEFAULT_RECIPE)
    default = bare_loop(Encoder(own.encoder, own.segments), images, batches=1)
    default(0)
    recipes = {}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CLIPFLOW_CACHE"] = folder  # random weights are not kept
            encoder = Encoder(_random(config.encoder, Path(folder, name)), config.segments)
            measured = bare_loop(encoder, images, batches=1)
            measured(0)
            recipes[name] = interleaved(name, measured, default, rounds)
    slowest = min(recipes.values(), key=lambda each: each.ratio)
    return TowersBenchmark(**{**dict(slowest), "name": "towers"}, images=images, recipes=recipes)


def _random(encoder: EncoderConfig, folder: Path) -> EncoderConfig:
    """The same encoder with random weights, which are written to `folder` as the files of a hub repository."""
    model: dict[str, Any] = {**open_clip.get_model_config(encoder.model), "text_cfg": _TEXT}
    published = open_clip.get_pretrained_cfg(encoder.model, encoder.pretrained)
    preprocess = {key: published[key] for key in _PREPROCESS}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    name = f"local-dir:{folder}"
    torch.manual_seed(0)
    state = open_clip.create_model(name, load_weights=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "open_clip_model.safetensors")
    return encoder.model_copy(update={"model": name, "pretrained": ""})
