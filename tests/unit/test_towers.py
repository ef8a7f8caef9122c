"""Each tower gives the features of open_clip's own model on open_clip's own preprocessing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipflow_ray.config import EncoderConfig
from clipflow_ray.errors import ConfigError
from clipflow_ray.images import Pixels, view
from clipflow_ray.model.encoder import Encoder, feature_widths, fingerprint
from clipflow_ray.model.weights import load_record
from tests.conftest import photo
from tests.towers import TOWERS, Tower


@dataclass
class Case:
    """A tower, our encoder of it, and open_clip's whole model with its own transform."""

    tower: Tower
    config: EncoderConfig
    encoder: Encoder
    model: Any
    transform: Any

    def views(self, count: int) -> list[Pixels]:
        """Images of the size of the view, so that resizing changes nothing."""
        return [photo(seed, (self.tower.size, self.tower.size)) for seed in range(count)]


@pytest.fixture(scope="module", params=TOWERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    tower = TOWERS[request.param]
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFLOW_CACHE", str(folder / "cache"))
        config = tower.write(folder / "repository")
        model, transform = open_clip.create_model_from_pretrained(config.model)
        yield Case(tower, config, Encoder(config, "cpu", threads=2), model.eval(), transform)


def block(visual: Any, number: int) -> Any:
    """The module whose output is that of the block, by the names that each architecture uses."""
    if hasattr(visual, "transformer"):
        return visual.transformer.resblocks[number - 1]
    if hasattr(visual, "attnpool"):
        return visual.get_submodule(f"layer{number - 1}")
    return visual.trunk.blocks[number - 1] if hasattr(visual.trunk, "blocks") else visual.trunk.stages[number - 1]


def expected(case: Case, images: list[Image.Image]) -> dict[str, np.ndarray]:
    """Features from open_clip's whole model and its own transform; forward hooks record the outputs of blocks."""
    visual, seen = case.model.visual, {}
    prefix = visual.trunk.num_prefix_tokens if hasattr(getattr(visual, "trunk", None), "num_prefix_tokens") else 1
    for name in case.tower.features:
        if name != "projected":
            number, kind = int(name[5:].partition(".")[0]), name.partition(".")[2]

            def keep(_: object, __: object, output: torch.Tensor, name: str = name, kind: str = kind) -> None:
                tokens = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
                first = 0 if output.ndim == 4 else prefix
                seen[name] = tokens[:, 0] if kind == "cls" else tokens[:, first:].mean(dim=1)

            block(visual, number).register_forward_hook(keep)
    with torch.inference_mode():
        seen["projected"] = case.model.encode_image(torch.stack([case.transform(image) for image in images]))
    return {name: seen[name].numpy() for name in case.tower.features}


def test_a_tower_gives_the_features_of_open_clips_own_model(case: Case) -> None:
    tower, encoder = case.tower, case.encoder
    assert (encoder.view.size, encoder.names, encoder.widths) == (tower.size, tower.features, tower.widths)
    found = encoder([view(rgb, encoder.view) for rgb in case.views(2)])
    for name, wanted in expected(case, [Image.fromarray(rgb) for rgb in case.views(2)]).items():
        assert np.abs(wanted[0] - wanted[1]).max() > 1e-3 * np.abs(wanted).max()
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-4, err_msg=name)


def test_a_view_is_open_clips_own_within_one_grey_level(case: Case) -> None:
    spec = load_record(case.config).view
    for seed, size in enumerate([(480, 640), (700, 300), (200, 260), (spec.size, spec.size)]):
        rgb = photo(seed, size)
        pixels = case.transform(Image.fromarray(rgb)).permute(1, 2, 0).numpy() * spec.std + spec.mean
        np.testing.assert_allclose(view(rgb, spec), pixels * 255, atol=1.01)


def test_features_do_not_depend_on_batch_mates_or_on_how_many_there_are(case: Case) -> None:
    views = case.views(2)
    together, backwards = case.encoder(views), case.encoder(views[::-1])
    alone = [case.encoder([view]) for view in views]
    for name in case.tower.features:
        np.testing.assert_array_equal(together[name], np.concatenate([each[name] for each in alone]))
        np.testing.assert_array_equal(backwards[name][::-1], together[name])


def test_the_fingerprint_and_the_widths_need_no_tensors(case: Case) -> None:
    record = load_record(case.config)
    assert not hasattr(record, "state")
    assert feature_widths(case.config, record, case.config.feature) == case.tower.widths
    assert fingerprint(case.config, record) == case.encoder.fingerprint


def test_a_tower_in_bfloat16_is_close_to_itself_in_float32_and_has_another_fingerprint(case: Case) -> None:
    half = Encoder(case.config.model_copy(update={"precision": "bfloat16"}), "cpu")
    assert half.fingerprint != case.encoder.fingerprint
    rounded = half(case.views(1))
    for name, wanted in case.encoder(case.views(1)).items():
        assert rounded[name].dtype == np.float32
        difference = np.linalg.norm(rounded[name] - wanted) / np.linalg.norm(wanted)
        assert 1e-5 < difference < 0.2, name


def test_a_block_beyond_the_last_and_a_class_token_that_is_not_there_are_refused(case: Case) -> None:
    record = load_record(case.config)
    with pytest.raises(ConfigError, match="blocks"):
        feature_widths(case.config, record, ("block99.mean",))
    if any(name.endswith(".cls") for name in case.tower.features):
        return
    with pytest.raises(ConfigError, match="no class token"):
        feature_widths(case.config, record, ("block1.cls",))
