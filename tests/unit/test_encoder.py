"""Embeddings compared with the outputs of open_clip's own tower, recorded by forward hooks."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

from clipflow_ray.config import OPENAI_VIEW, TEST_TOWER, EncoderConfig, Segment, ViewSpec
from clipflow_ray.errors import ConfigError, WeightsError
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.encoder import _CUDA_CHUNK, Encoder, fingerprint, resolved
from clipflow_ray.model.extractor import F32, joined
from clipflow_ray.model.weights import (
    TowerRecord,
    architecture_of,
    build_tower,
    cached_path,
    contents_sha256,
    load_record,
    load_weights,
)
from tests.unit.test_weights import PACKAGED_SHA256

TOWER = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
ALL = ("block2.mean", "projected", "block1.cls", "block1.mean", "block2.cls")
TWO_SIZES = ("block2.cls@448", "block1.mean@224", "block2.cls@224", "projected@448")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFLOW_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def views() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 7, 7, 3))
    fine = np.kron(coarse, np.ones((1, 32, 32, 1))) + rng.normal(0, 20, (6, 224, 224, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reference(views: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of the tower and, recorded by forward hooks, of its blocks, on pixels prepared by torchvision."""
    weights = load_weights(TOWER)
    tower = build_tower(weights.architecture).eval()
    tower.load_state_dict(weights.state)
    tokens: list[Tensor] = []

    def keep(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens.append(output)

    for block in tower.get_submodule("transformer.resblocks").children():
        block.register_forward_hook(keep)
    pixels = torch.stack([normalize(to_tensor(v), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) for v in views])
    with torch.inference_mode():
        outputs = {"projected": tower(pixels)}
    for number, block_tokens in enumerate(tokens, start=1):
        assert block_tokens.shape == (6, 1 + 7 * 7, 64)
        outputs[f"block{number}.cls"] = block_tokens[:, 0]
        outputs[f"block{number}.mean"] = block_tokens[:, 1:].mean(dim=1)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def segment(name: str) -> Segment:
    """`block2.cls@448`, or `block2.cls` at the tower's own size."""
    feature, _, size = name.partition("@")
    return Segment(feature=feature, size=int(size) if size else None)


def encoder(*names: str, threads: int | None = None, **changes: str) -> Encoder:
    segments = [segment(name) for name in names or ("projected",)]
    return Encoder(TOWER.model_copy(update=changes), segments, device="cpu", threads=threads)


def packed(tower: Encoder, views: np.ndarray) -> np.ndarray:
    """Views of 224 pixels as the tower takes them. For a larger size, each pixel is repeated."""
    at_size = [views.repeat(size // 224, axis=1).repeat(size // 224, axis=2) for size in tower.view.sizes]
    return np.concatenate([each.reshape(len(views), -1) for each in at_size], axis=1)


def embedded(tower: Encoder, views: np.ndarray) -> F32:
    """The outputs of the tower for views of 224 pixels, concatenated."""
    return joined(tower(packed(tower, views)), tower.segments)


def test_the_projected_feature_is_the_towers_output(views: np.ndarray, reference: dict[str, np.ndarray]) -> None:
    embeddings = embedded(encoder(), views)
    assert embeddings.dtype == np.float32 and embeddings.shape == (6, 32)
    np.testing.assert_allclose(embeddings, reference["projected"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_each_single_feature_equals_the_output_of_its_block(
    name: str, views: np.ndarray, reference: dict[str, np.ndarray]
) -> None:
    np.testing.assert_allclose(embedded(encoder(name), views), reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [ALL, ("block1.cls", "block2.cls"), ("projected", "block2.mean")])
def test_features_are_concatenated_in_the_order_they_are_named(
    names: tuple[str, ...], views: np.ndarray, reference: dict[str, np.ndarray]
) -> None:
    expected = np.concatenate([reference[name] for name in names], axis=1)
    np.testing.assert_allclose(embedded(encoder(*names), views), expected, rtol=1e-4, atol=1e-5)
    tower = encoder(*names)
    each = tower(packed(tower, views))
    assert list(each) == [f"{name}@224" for name in names] == list(tower.names)
    assert [part.shape[1] for part in each.values()] == [32 if name == "projected" else 64 for name in names]


def test_a_size_that_is_left_out_is_the_towers_own_and_the_default_output_is_projected(views: np.ndarray) -> None:
    left_out, named = encoder("block1.mean", "projected"), encoder("block1.mean@224", "projected@224")
    assert left_out.segments == named.segments
    np.testing.assert_array_equal(embedded(left_out, views), embedded(named, views))
    assert Encoder(TOWER, device="cpu").names == ("projected@224",)


@pytest.mark.parametrize("names", [("projected",), ALL, TWO_SIZES])
def test_an_embedding_does_not_depend_on_its_batch_mates(names: tuple[str, ...], views: np.ndarray) -> None:
    tower = encoder(*names)
    alone = np.concatenate([embedded(tower, view[None]) for view in views])
    np.testing.assert_array_equal(embedded(tower, views), alone)
    extreme = np.stack([np.zeros_like(views[0]), views[2], np.full_like(views[0], 255)])
    np.testing.assert_array_equal(embedded(tower, extreme)[1], alone[2])
    assert np.abs(alone[0] - alone[1]).max() > 1e-3 * np.abs(alone).max()


@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_on_cuda_every_forward_pass_has_32_images(views: np.ndarray, count: int) -> None:
    tower = encoder(*ALL)
    many = np.concatenate([np.roll(views, shift, axis=2) for shift in range(0, 60, 10)])[:count]
    expected = embedded(tower, many)
    tower._chunks, tower._pool, sizes = {224: _CUDA_CHUNK}, None, []  # as on CUDA, on this processor
    conv1: Any = tower._towers[224].conv1
    conv1.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    np.testing.assert_allclose(embedded(tower, many), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [32] * -(-count // 32)


def test_an_encoder_switches_tf32_off_in_the_process() -> None:
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        encoder("projected")
        assert [backend.allow_tf32 for backend in backends] == [False, False]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_embeddings_of_many_views_on_several_threads_are_those_of_one_view_at_a_time(views: np.ndarray) -> None:
    shifted = [np.roll(views, shift, axis=2) for shift in range(0, 60, 10)]
    many = np.concatenate(shifted)[:33]
    one_by_one = encoder(*ALL, threads=1)
    expected = np.concatenate([embedded(one_by_one, view[None]) for view in many])
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-2  # all differ, so a wrong order would fail
    np.testing.assert_array_equal(embedded(encoder(*ALL, threads=3), many), expected)


def test_an_encoder_does_not_change_the_torch_threads_of_other_threads(views: np.ndarray) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        embedded(encoder(threads=2), np.concatenate([views] * 3))
        with ThreadPoolExecutor(1) as later:
            assert (torch.get_num_threads(), later.submit(torch.get_num_threads).result()) == (5, 5)
    finally:
        torch.set_num_threads(before)


def test_views_are_not_written_to_and_may_be_read_only_or_strided(views: np.ndarray) -> None:
    tower = encoder()
    given = packed(tower, views)
    before = given.copy()
    expected = tower(given)["projected@224"]
    np.testing.assert_array_equal(given, before)
    frozen = given.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(tower(frozen)["projected@224"], expected)
        np.testing.assert_array_equal(tower(list(frozen))["projected@224"], expected)
    mirrored = views[::-1, :, ::-1]
    strided, contiguous = (tower.encode(each, tower.segments) for each in (mirrored, np.ascontiguousarray(mirrored)))
    np.testing.assert_array_equal(strided["projected@224"], contiguous["projected@224"])


@pytest.fixture(scope="module")
def enlarged(views: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of a tower that open_clip builds for 448 pixels, with positional embeddings by timm's function."""
    weights = load_weights(TOWER)
    tower = build_tower(weights.architecture | {"vision_cfg": weights.architecture["vision_cfg"] | {"image_size": 448}})
    positions = resample_abs_pos_embed(weights.state["positional_embedding"][None], [14, 14], [7, 7])[0]
    assert positions.shape == (1 + 14 * 14, 64)
    tower.eval().load_state_dict({**weights.state, "positional_embedding": positions})
    blocks: list[Tensor] = []
    tower.get_submodule("transformer.resblocks.1").register_forward_hook(lambda block, given, out: blocks.append(out))
    large = views.repeat(2, axis=1).repeat(2, axis=2)
    pixels = torch.stack([normalize(to_tensor(v), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) for v in large])
    with torch.inference_mode():
        outputs = {"projected@448": tower(pixels).numpy()}
    return outputs | {"block2.cls@448": blocks[0][:, 0].numpy()}


def test_at_twice_its_size_a_tower_is_one_of_that_size_with_interpolated_positional_embeddings(
    views: np.ndarray, enlarged: dict[str, np.ndarray]
) -> None:
    tower = encoder(*TWO_SIZES)
    found = tower(packed(tower, views))
    for name, wanted in enlarged.items():
        assert np.isfinite(found[name]).all()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    assert np.abs(found["block2.cls@448"] - found["block2.cls@224"]).max() > 0.01


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_size_of_an_encoder_of_two_sizes_is_that_of_an_encoder_of_one_to_the_bit(
    precision: str, views: np.ndarray
) -> None:
    for names in (TWO_SIZES, (*TWO_SIZES[1:], TWO_SIZES[0])):
        both = encoder(*names, precision=precision)
        assert both.view.sizes == tuple(sorted({int(name[-3:]) for name in names})) and both.names == names
        found = both(packed(both, views))
        for name in names:
            np.testing.assert_array_equal(found[name], embedded(encoder(name, precision=precision), views), name)


@pytest.mark.parametrize("size", [1, 100, 225, 447])
def test_a_size_that_the_patch_does_not_divide_is_refused_in_a_sentence(size: int) -> None:
    with pytest.raises(
        ConfigError, match=f"cannot take views of {size} pixels; choose a multiple of its patches of 32"
    ):
        encoder(f"projected@{size}")


def test_without_segments_the_depth_of_the_tower_decides(views: np.ndarray) -> None:
    record = load_record(TOWER)
    chosen = resolved((), TOWER, record)
    assert [each.name for each in chosen] == ["block1.mean@224", "block2.cls@224.paired", "block2.cls@448.paired"]
    one = Segment(feature="block1.cls", training="paired")
    assert resolved((one,), TOWER, record) == (one.model_copy(update={"size": 224}),)


@pytest.mark.parametrize("name", ["block3.cls", "block3.mean", "block99.cls"])
def test_a_block_that_the_tower_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="2 blocks"):
        encoder("projected", name)


def test_the_fingerprint_depends_on_view_and_weights_but_not_on_the_feature() -> None:
    base = encoder()
    assert base.fingerprint == encoder().fingerprint == encoder(*ALL).fingerprint
    others = [encoder(view="crop"), encoder(pretrained="seed:1"), encoder(view="crop", pretrained="seed:1")]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert len(base.fingerprint) == 16 and int(base.fingerprint, 16) >= 0


def test_the_fingerprint_depends_on_each_part_of_the_view_and_on_the_precision() -> None:
    config, record = EncoderConfig(model=TEST_TOWER, pretrained="seed:0"), load_record(TOWER)
    changes: list[dict[str, object]] = [
        {"kind": "crop"},
        {"sizes": (256,)},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
    ]
    assert {name for change in changes for name in change} == set(ViewSpec.model_fields)
    others = [replace(record, view=record.view.model_copy(update=change)) for change in changes]
    half = config.model_copy(update={"precision": "bfloat16"})
    found = [fingerprint(config, each, each.view.sizes) for each in (record, *others)]
    assert len({*found, fingerprint(half, record, record.view.sizes)}) == 2 + len(changes)


def test_the_fingerprint_changes_with_another_size_of_view_and_not_with_the_towers_own_or_their_order() -> None:
    record = load_record(TOWER)
    own = encoder("projected").fingerprint
    assert own == encoder("block1.mean@224").fingerprint == fingerprint(TOWER, record, (224,))
    both, larger, other = (fingerprint(TOWER, record, sizes) for sizes in ((224, 448), (448,), (224, 256)))
    assert len({own, both, larger, other}) == 4
    assert both == fingerprint(TOWER, record, (448, 224)) == encoder(*TWO_SIZES).fingerprint
    assert larger == encoder("projected@448").fingerprint


def test_the_fingerprint_of_the_packaged_encoder_at_its_own_size_is_that_of_format_version_1() -> None:
    packaged = load_checkpoint("fast").at("float32")
    record = TowerRecord(PACKAGED_SHA256, architecture_of(packaged.encoder.model), OPENAI_VIEW)
    assert (
        fingerprint(packaged.encoder, record, packaged.view.sizes) == packaged.encoder_fingerprint == "e66e6ed4105b2026"
    )
    assert packaged.view == OPENAI_VIEW


def test_bfloat16_embeddings_are_float32_close_to_exact_ones_and_independent_of_batch_mates(views: np.ndarray) -> None:
    exact, rounded = (encoder(*ALL, precision=precision) for precision in ("float32", "bfloat16"))
    found, wanted = embedded(rounded, views), embedded(exact, views)
    assert found.dtype == np.float32
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02
    np.testing.assert_array_equal(embedded(rounded, views[2:3])[0], found[2])


def test_the_fingerprint_depends_on_the_models_name_even_with_the_same_weights(tmp_path: Path) -> None:
    # With quick_gelu the same tensors give another output, and only the name of the model selects quick_gelu.
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 112},
        "text_cfg": {"context_length": 4, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
    }
    names = ("clipflow-unit-test-gelu", "clipflow-unit-test-quickgelu")
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps({**config, "quick_gelu": name.endswith("quickgelu")}))
    open_clip.add_model_config(tmp_path)
    file = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model(names[0]).state_dict(), file)
    gelu, quick = (Encoder(EncoderConfig(model=name, pretrained=str(file)), device="cpu") for name in names)
    assert load_weights(gelu.config).sha256 == load_weights(quick.config).sha256
    assert gelu.fingerprint != quick.fingerprint


def test_weights_of_another_shape_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFLOW_CACHE", str(tmp_path))
    weights = load_weights(TOWER)
    state = {**weights.state, "proj": torch.zeros(64, 31)}
    with safe_open(cached_path(TOWER), framework="pt") as file:
        record = json.dumps(json.loads(file.metadata()["record"]) | {"sha256": contents_sha256(state)})
    metadata = {"record": record, "record_sha256": hashlib.sha256(record.encode()).hexdigest()}
    save_file(state, cached_path(TOWER), metadata)
    with pytest.raises(WeightsError, match="do not fit"):
        Encoder(TOWER, device="cpu")
