"""Each tower gives the features of open_clip's own model on open_clip's own preprocessing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from clipflow_ray.config import EncoderConfig
from clipflow_ray.errors import ConfigError
from clipflow_ray.images import view
from clipflow_ray.model.encoder import Encoder, feature_widths, fingerprint
from clipflow_ray.model.weights import load_record
from tests.conftest import photo
from tests.towers import TOWERS, Tower


@pytest.fixture(scope="module", params=TOWERS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tower, EncoderConfig]]:
    tower = TOWERS[request.param]
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFLOW_CACHE", str(folder / "cache"))
        yield tower, tower.write(folder / "repository")


def block(model: nn.Module, number: int) -> nn.Module:
    """The module that computes block `number`; each architecture has its own name for it."""
    visual: Any = model.visual
    found: nn.Module
    if hasattr(visual, "transformer"):
        found = visual.transformer.resblocks[number - 1]
    elif hasattr(visual, "attnpool"):
        found = visual.get_submodule(f"layer{number - 1}")
    else:
        found = (visual.trunk.blocks if hasattr(visual.trunk, "blocks") else visual.trunk.stages)[number - 1]
    return found


def expected(config: EncoderConfig, images: list[Image.Image]) -> dict[str, np.ndarray]:
    """Features from open_clip's whole model and its own transform; forward hooks record the outputs of blocks."""
    model, transform = open_clip.create_model_from_pretrained(config.model)
    seen: dict[str, torch.Tensor] = {}
    for name in config.feature:
        if name != "projected":
            number, kind = int(name[5:].partition(".")[0]), name.partition(".")[2]

            def keep(_: nn.Module, __: object, output: torch.Tensor, name: str = name, kind: str = kind) -> None:
                if output.ndim == 4:
                    seen[name] = output.mean(dim=(2, 3))
                else:
                    prefix = (
                        0
                        if getattr(model.visual, "trunk", None) is not None
                        and model.visual.trunk.num_prefix_tokens == 0
                        else 1
                    )
                    seen[name] = output[:, 0] if kind == "cls" else output[:, prefix:].mean(dim=1)

            block(model.eval(), number).register_forward_hook(keep)
    with torch.inference_mode():
        seen["projected"] = model.encode_image(torch.stack([transform(image) for image in images]))
    return {name: seen[name].numpy() for name in config.feature}


def test_a_tower_gives_the_features_of_open_clips_own_model(written: tuple[Tower, EncoderConfig]) -> None:
    tower, config = written
    encoder = Encoder(config, "cpu")
    assert (encoder.view.size, encoder.names, encoder.widths) == (tower.size, tower.features, tower.widths)
    images = [photo(seed, (tower.size, tower.size)) for seed in range(2)]  # of the view's size: nothing is resized
    found = encoder([view(rgb, encoder.view) for rgb in images])
    for name, wanted in expected(config, [Image.fromarray(rgb) for rgb in images]).items():
        assert np.abs(wanted[0] - wanted[1]).max() > 1e-3 * np.abs(wanted).max()
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-4, err_msg=name)


def test_a_view_equals_open_clips_own_within_one_grey_level(written: tuple[Tower, EncoderConfig]) -> None:
    spec = load_record(written[1]).view
    _, transform = open_clip.create_model_from_pretrained(written[1].model)
    for seed, size in enumerate([(480, 640), (700, 300), (200, 260), (spec.size, spec.size)]):
        rgb = photo(seed, size)
        pixels = transform(Image.fromarray(rgb)).permute(1, 2, 0).numpy() * spec.std + spec.mean
        np.testing.assert_allclose(view(rgb, spec), pixels * 255, atol=1.01)


def test_the_fingerprint_and_the_widths_need_no_tensors(written: tuple[Tower, EncoderConfig]) -> None:
    tower, config = written
    record = load_record(config)
    assert not hasattr(record, "state")
    assert feature_widths(config, record, config.feature) == tower.widths
    assert fingerprint(config, record) == Encoder(config, "cpu").fingerprint
    half = config.model_copy(update={"precision": "bfloat16"})
    assert fingerprint(half, record) == Encoder(half, "cpu").fingerprint != fingerprint(config, record)


def test_a_tower_in_bfloat16_is_close_to_itself_in_float32(written: tuple[Tower, EncoderConfig]) -> None:
    tower, config = written
    views = [photo(seed, (tower.size, tower.size)) for seed in range(2)]
    exact = Encoder(config, "cpu")(views)
    rounded = Encoder(config.model_copy(update={"precision": "bfloat16"}), "cpu")(views)
    for name, wanted in exact.items():
        assert rounded[name].dtype == np.float32
        difference = np.linalg.norm(rounded[name] - wanted) / np.linalg.norm(wanted)
        assert 1e-5 < difference < 0.2, name


def test_a_block_or_a_class_token_that_the_tower_lacks_is_refused(
    written: tuple[Tower, EncoderConfig],
) -> None:
    tower, config = written
    record = load_record(config)
    with pytest.raises(ConfigError, match="blocks"):
        feature_widths(config, record, ("block99.mean",))
    if any(name.endswith(".cls") for name in tower.features):
        return
    with pytest.raises(ConfigError, match="no class token"):
        feature_widths(config, record, ("block1.cls",))
