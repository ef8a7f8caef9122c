"""Each tower gives the features of open_clip's own model on open_clip's own preprocessing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.layers.pos_embed import resample_abs_pos_embed
from torchvision.transforms.functional import normalize, to_tensor

from clipflow_ray.config import EncoderConfig, Segment
from clipflow_ray.errors import ConfigError
from clipflow_ray.images import Pixels, view, views
from clipflow_ray.model.encoder import Encoder, fingerprint, resolved, view_of, widths_of
from clipflow_ray.model.weights import build_tower, load_record, load_weights
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

    def images(self, count: int) -> list[Pixels]:
        """Images of the size of the view, so that resizing changes nothing."""
        return [photo(seed, (self.tower.size, self.tower.size)) for seed in range(count)]

    def views(self, count: int) -> list[Pixels]:
        """The packed views of `images`."""
        return [views(rgb, self.encoder.view) for rgb in self.images(count)]


# The largest tower takes half of the time of all five, so it runs in `make stress`.
LARGEST = pytest.param("ViT-B-16-SigLIP2-256", marks=pytest.mark.stress)


@pytest.fixture(scope="module", params=[LARGEST if name in LARGEST.values else name for name in TOWERS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    tower = TOWERS[request.param]
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFLOW_CACHE", str(folder / "cache"))
        config = tower.write(folder / "repository")
        model, transform = open_clip.create_model_from_pretrained(config.model)
        yield Case(tower, config, Encoder(config, tower.segments, "cpu", threads=2), model.eval(), transform)


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
    names = tuple(f"{name}@{tower.size}" for name in tower.features)
    assert (encoder.view.sizes, encoder.names, encoder.widths) == ((tower.size,), names, tower.widths)
    found = encoder(case.views(2))
    for name, wanted in expected(case, [Image.fromarray(rgb) for rgb in case.images(2)]).items():
        assert np.abs(wanted[0] - wanted[1]).max() > 1e-3 * np.abs(wanted).max()
        np.testing.assert_allclose(
            found[f"{name}@{tower.size}"], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-4, err_msg=name
        )


def test_a_view_is_open_clips_own_within_one_grey_level(case: Case) -> None:
    spec, side = load_record(case.config).view, case.tower.size
    for seed, size in enumerate([(480, 640), (700, 300), (200, 260), (side, side)]):
        rgb = photo(seed, size)
        pixels = case.transform(Image.fromarray(rgb)).permute(1, 2, 0).numpy() * spec.std + spec.mean
        np.testing.assert_allclose(view(rgb, spec, side), pixels * 255, atol=1.01)


def test_features_do_not_depend_on_batch_mates_or_on_how_many_there_are(case: Case) -> None:
    views = case.views(2)
    together, backwards = case.encoder(views), case.encoder(views[::-1])
    alone = [case.encoder([view]) for view in views]
    for name in case.encoder.names:
        np.testing.assert_array_equal(together[name], np.concatenate([each[name] for each in alone]))
        np.testing.assert_array_equal(backwards[name][::-1], together[name])


def test_the_fingerprint_and_the_widths_need_no_tensors(case: Case) -> None:
    record = load_record(case.config)
    assert not hasattr(record, "state")
    assert widths_of(case.tower.segments, case.config, record) == case.tower.widths
    assert fingerprint(case.config, record, (case.tower.size,)) == case.encoder.fingerprint


def test_a_tower_in_bfloat16_is_close_to_itself_in_float32_and_has_another_fingerprint(case: Case) -> None:
    half = Encoder(case.config.model_copy(update={"precision": "bfloat16"}), case.tower.segments, "cpu")
    assert half.fingerprint != case.encoder.fingerprint
    rounded = half(case.views(1))
    for name, wanted in case.encoder(case.views(1)).items():
        assert rounded[name].dtype == np.float32
        difference = np.linalg.norm(rounded[name] - wanted) / np.linalg.norm(wanted)
        assert 1e-5 < difference < 0.2, name


def test_a_block_beyond_the_last_and_a_class_token_that_is_not_there_are_refused(case: Case) -> None:
    record, size = load_record(case.config), case.tower.size
    with pytest.raises(ConfigError, match="blocks"):
        widths_of([Segment(feature="block99.mean", size=size)], case.config, record)
    if any(name.endswith(".cls") for name in case.tower.features):
        return
    with pytest.raises(ConfigError, match="no class token"):
        widths_of([Segment(feature="block1.cls", size=size)], case.config, record)


def test_without_segments_the_depth_of_the_tower_decides(case: Case) -> None:
    record = load_record(case.config)
    chosen = resolved((), case.config, record)
    assert tuple(each.name for each in chosen) == case.tower.default
    assert len(widths_of(chosen, case.config, record)) == len(chosen)
    assert view_of(chosen, record).sizes in ((case.tower.size,), (case.tower.size, 2 * case.tower.size))


def test_at_another_size_a_tower_is_one_of_that_size_or_is_refused(case: Case) -> None:
    name, own = case.tower.features[0], case.tower.size
    number, kind = int(name[5:].partition(".")[0]), name.partition(".")[2]
    size = own // 2  # cheaper than twice the size, which is interpolated by the same code
    wanted = [Segment(feature=name, size=each) for each in (own, size)]
    if len(case.tower.default) == 2:  # the rule of depth gives such a tower no other size
        with pytest.raises(ConfigError, match=f"takes views of {own} pixels, not of {size}"):
            Encoder(case.config, wanted, "cpu")
        return
    both, rgb = Encoder(case.config, wanted, "cpu", threads=2), photo(5, (own, own))
    found = both([views(rgb, both.view)])
    np.testing.assert_array_equal(
        found[f"{name}@{own}"], case.encoder([views(rgb, case.encoder.view)])[f"{name}@{own}"]
    )
    assert both.fingerprint != case.encoder.fingerprint

    whole, prefix = of_size(case.config, size)
    pixels = to_tensor(Image.fromarray(view(rgb, both.view, size)))
    tokens: list[torch.Tensor] = []
    block(whole, number).register_forward_hook(lambda module, given, output: tokens.append(output))
    with torch.inference_mode():
        whole(normalize(pixels, both.view.mean, both.view.std)[None])
    expected = tokens[0][:, 0] if kind == "cls" else tokens[0][:, prefix:].mean(dim=1)
    atol = 1e-5 * float(expected.abs().max())
    np.testing.assert_allclose(found[f"{name}@{size}"], expected.numpy(), atol=atol, rtol=1e-4)


def of_size(config: EncoderConfig, size: int) -> tuple[Any, int]:
    """A tower made for views of `size`, with positional embeddings by timm's function, and its number of class tokens.

    open_clip makes its own towers, and timm makes those that open_clip takes from it.
    """
    weights = load_weights(config)
    vision = weights.architecture["vision_cfg"]
    if "timm_model_name" not in vision:
        tower: Any = build_tower({**weights.architecture, "vision_cfg": vision | {"image_size": size}})
        grid = [size // vision["patch_size"]] * 2
        embedding = resample_abs_pos_embed(weights.state["positional_embedding"][None], grid)[0]
        tower.load_state_dict({**weights.state, "positional_embedding": embedding})
        return tower.eval(), 1
    trunk: Any = timm.create_model(vision["timm_model_name"], img_size=size, num_classes=0)
    state = {key.removeprefix("trunk."): value for key, value in weights.state.items() if key.startswith("trunk.")}
    prefix = trunk.num_prefix_tokens
    embedding = resample_abs_pos_embed(state["pos_embed"], trunk.patch_embed.grid_size, num_prefix_tokens=prefix)
    trunk.load_state_dict({key: value for key, value in state.items() if "head" not in key} | {"pos_embed": embedding})
    return Trunk(trunk).eval(), prefix


class Trunk(torch.nn.Module):
    """A tower of timm under the name that open_clip gives it."""

    def __init__(self, trunk: torch.nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.trunk(planes)
        return output
