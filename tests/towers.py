"""Towers with the sizes, normalisations and architectures of published weights. Each has weights of a fixed seed."""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import (
    INCEPTION_MEAN,
    INCEPTION_STD,
    OPENAI_DATASET_MEAN,
    OPENAI_DATASET_STD,
)
from safetensors.torch import save_file

from clipflow_ray.config import EncoderConfig, Segment

OPENAI = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
SIGLIP = {"mean": INCEPTION_MEAN, "std": INCEPTION_STD, "interpolation": "bicubic", "resize_mode": "squash"}
_TEXT = {"context_length": 4, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Tower:
    """The open_clip model named `model`. `cut` replaces entries of its `vision_cfg`: large models get fewer layers.

    `default` are the names of the segments that the rule of depth gives.
    """

    model: str
    size: int
    preprocess: dict[str, Any]
    features: tuple[str, ...]
    widths: tuple[int, ...]
    default: tuple[str, ...]
    cut: dict[str, Any] = field(default_factory=dict)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """A plain segment for each of the features, at the tower's own size."""
        return tuple(Segment(feature=name, size=self.size) for name in self.features)

    def write(self, folder: Path) -> EncoderConfig:
        """Write the files of a hub repository to `folder` and return the EncoderConfig that names it."""
        config: dict[str, Any] = deepcopy(open_clip.get_model_config(self.model))
        config["vision_cfg"] |= self.cut
        config["text_cfg"] = _TEXT
        folder.mkdir()
        record = {"model_cfg": config, "preprocess_cfg": self.preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(record))
        name = f"local-dir:{folder}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(name, load_weights=False)
            for parameter in model.visual.parameters():  # a branch whose weights start at zero would not be tested
                parameter.data += 0.01 * torch.randn(parameter.shape)
            norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = None  # keeps the statistics of the batch below; by default all outputs are alike
            if norms:
                with torch.no_grad():
                    model.visual.train()(torch.rand(4, 3, self.size, self.size))
        save_file(
            {key: value.clone().contiguous() for key, value in model.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
        return EncoderConfig(model=name)


TOWERS = {
    "ViT-L-14-336": Tower(
        "ViT-L-14-336",
        336,
        OPENAI,
        ("block1.mean", "block2.cls", "projected"),
        (1024, 1024, 768),
        ("block1.mean@336", "block2.cls@336.paired", "block2.cls@672.paired"),
        {"layers": 2},
    ),
    "PE-Core-T-16-384": Tower(
        "PE-Core-T-16-384",
        384,
        SIGLIP | {"interpolation": "bilinear"},
        ("block5.cls", "block12.mean", "projected"),
        (192, 192, 512),
        ("block6.mean@384", "block11.cls@384.paired", "block11.cls@768.paired"),
    ),
    "ViT-B-16-SigLIP2-256": Tower(
        "ViT-B-16-SigLIP2-256",
        256,
        SIGLIP,
        ("block2.mean", "projected"),
        (768, 768),
        ("block6.mean@256", "block11.mean@256.paired", "block11.mean@512.paired"),
    ),
    "MobileCLIP2-S0": Tower(
        "MobileCLIP2-S0",
        256,
        OPENAI | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"},
        ("block2.mean", "projected"),
        (128, 512),
        ("block2.mean@256", "block4.mean@256.paired"),
    ),
    "RN50": Tower(
        "RN50",
        224,
        OPENAI,
        ("block3.mean", "projected"),
        (512, 1024),
        ("block2.mean@224", "block5.mean@224.paired"),
        {"layers": [1, 1, 1, 1]},
    ),
}
