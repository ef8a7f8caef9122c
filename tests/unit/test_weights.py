"""Tower weights are reproducible, cached once, refused if altered, and never random by mistake."""

import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from clipflow_ray.config import OPENAI_VIEW, PACKAGED_WEIGHTS, TEST_TOWER, EncoderConfig, ViewSpec
from clipflow_ray.errors import WeightsError
from clipflow_ray.model.weights import (
    TowerRecord,
    architecture_of,
    build_tower,
    cache_dir,
    cached_path,
    contents_sha256,
    load_record,
    load_weights,
)

TOWER = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
TINY = "clipflow-unit-test-tiny"
# Part of the fingerprint in each checkpoint: another dequantization would make all of them unusable.
PACKAGED_SHA256 = "cc73a66ebb83340cabc6ecf952113199ad66eb17d42a405b11cc66cf4d8d1cb8"


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test; the tests of the real weights use the user's own."""
    if request.node.get_closest_marker("real_weights"):
        monkeypatch.delenv("CLIPFLOW_CACHE", raising=False)
    else:
        monkeypatch.setenv("CLIPFLOW_CACHE", str(tmp_path / "cache"))
    return cache_dir()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A CLIP model with two image blocks and one text block, registered with open_clip as TINY."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 56},
        "text_cfg": {"context_length": 4, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
    }
    path = tmp_path_factory.mktemp("configs") / f"{TINY}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return open_clip.create_model(TINY)


def rewritten(path: Path, change: Any) -> None:
    """Write the cache file again after `change(state, metadata)`."""
    with safe_open(path, framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(state, metadata)
    save_file(state, path, metadata)


def test_the_test_tower_is_the_same_in_every_fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFLOW_CACHE", str(tmp_path / "one"))
    torch.manual_seed(1)
    first = load_weights(TOWER)
    monkeypatch.setenv("CLIPFLOW_CACHE", str(tmp_path / "two"))
    torch.manual_seed(2)
    expected_draw = torch.rand(1)
    torch.manual_seed(2)
    second = load_weights(TOWER)
    assert torch.equal(torch.rand(1), expected_draw), "loading does not disturb the caller's random stream"
    assert first.sha256 == second.sha256 == contents_sha256(first.state)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    build_tower(second.architecture).load_state_dict(second.state, strict=True)


def test_each_seed_gives_another_tower() -> None:
    other = EncoderConfig(model=TEST_TOWER, pretrained="seed:1")
    assert load_weights(TOWER).sha256 != load_weights(other).sha256
    assert cached_path(TOWER) != cached_path(other)


def test_the_second_load_reads_the_cache_and_does_not_change_it(cache: Path) -> None:
    assert not cached_path(TOWER).exists()
    first = load_weights(TOWER)
    before = cached_path(TOWER).stat()
    assert load_weights(TOWER).sha256 == first.sha256
    assert cached_path(TOWER).stat().st_mtime_ns == before.st_mtime_ns
    assert [name for name in os.listdir(cache) if not name.endswith(".lock")] == [cached_path(TOWER).name]

    # The cached file itself is read: if the file of another seed has its name, those weights are loaded.
    other = EncoderConfig(model=TEST_TOWER, pretrained="seed:1")
    load_weights(other)
    cached_path(other).replace(cached_path(TOWER))
    assert load_weights(TOWER).sha256 != first.sha256


@pytest.mark.parametrize("part", ["tensor", "name", "mean", "no record", "no record_sha256"])
def test_a_cache_file_that_was_altered_is_refused(part: str) -> None:
    load_weights(TOWER)

    def change(state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        if part == "tensor":
            state["proj"][0, 0] += 1e-6
        elif part == "name":
            state["projection"] = state.pop("proj")
        elif part == "mean":
            assert "0.48145466" in metadata["record"]
            metadata["record"] = metadata["record"].replace("0.48145466", "0.48145467")
        else:
            del metadata[part.removeprefix("no ")]

    rewritten(cached_path(TOWER), change)
    with pytest.raises(WeightsError, match="delete the file"):
        load_weights(TOWER)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.999])
def test_a_truncated_cache_file_is_refused(fraction: float) -> None:
    load_weights(TOWER)
    data = cached_path(TOWER).read_bytes()
    cached_path(TOWER).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(WeightsError, match="delete the file"):
        load_weights(TOWER)


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("no-such-model", "openai", "no-such-model"),
        ("no-such-model", PACKAGED_WEIGHTS, "ViT-B-16-quickgelu"),
        ("ViT-B-32", PACKAGED_WEIGHTS, "ViT-B-16-quickgelu"),
        (TINY, "no-such-tag", "Name a local file, a tag that this machine can reach"),
        (TINY, "/no/such/file.safetensors", "Name a local file"),
    ],
)
def test_unavailable_weights_raise_an_error_that_says_what_to_do(
    tiny_clip: Any, cache: Path, model: str, pretrained: str, said: str
) -> None:
    with pytest.raises(WeightsError, match=said):
        load_weights(EncoderConfig(model=model, pretrained=pretrained))
    assert not list(cache.glob("*.safetensors")), "nothing is cached, least of all random weights"


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(WeightsError, match="list_models"):
        architecture_of("no-such-model")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_local_file_gives_its_image_tower_and_is_read_again_after_a_change(
    tiny_clip: Any, tmp_path: Path, suffix: str
) -> None:
    def write(state: dict[str, torch.Tensor]) -> None:
        if suffix == ".pt":
            torch.save(state, file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)

    file = tmp_path / f"tiny{suffix}"
    write(tiny_clip.state_dict())
    config = EncoderConfig(model=TINY, pretrained=str(file))
    first = load_weights(config)
    assert first.sha256 == contents_sha256(tiny_clip.visual.state_dict())
    build_tower(first.architecture).load_state_dict(first.state, strict=True)

    changed = {name: tensor.clone() for name, tensor in tiny_clip.state_dict().items()}
    changed["visual.proj"] += 1.0
    write(changed)
    os.utime(file, ns=(1, 1))
    np.testing.assert_allclose(load_weights(config).state["proj"], first.state["proj"] + 1.0)


def repository(folder: Path, preprocess: dict[str, Any], image_size: Any = 224) -> EncoderConfig:
    """A configuration and weights as a hub repository holds them."""
    folder.mkdir()
    vision = {"image_size": image_size, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
    config: dict[str, Any] = {"embed_dim": 8, "vision_cfg": vision}
    config["text_cfg"] = {"context_length": 4, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
    record = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return EncoderConfig(model=f"local-dir:{folder}")


def test_a_folder_gives_its_tower_and_the_view_that_it_records(tmp_path: Path) -> None:
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    config = repository(tmp_path / "tower", preprocess, 96)
    weights = load_weights(config)
    assert weights.view == ViewSpec(kind="resize", sizes=(96,), **preprocess)
    assert load_record(config.model_copy(update={"view": "crop"})).view.kind == "crop"
    before = cached_path(config)
    os.utime(tmp_path / "tower/open_clip_model.safetensors", ns=(1, 1))
    assert cached_path(config) != before


@pytest.mark.parametrize(
    ("preprocess", "image_size", "said"),
    [
        ({"resize_mode": "longest"}, 224, "resize_mode 'longest'"),
        ({"interpolation": "random"}, 224, "interpolation 'random'"),
        ({}, [224, 192], r"size \[224, 192\]"),
    ],
)
def test_preprocessing_that_a_view_cannot_follow_is_refused_in_a_sentence(
    tmp_path: Path, cache: Path, preprocess: dict[str, Any], image_size: Any, said: str
) -> None:
    config = repository(tmp_path / "tower", preprocess, image_size)
    with pytest.raises(WeightsError, match=f"prepares images with {said}, which is not supported; choose"):
        load_record(config)
    assert not list(cache.glob("*.safetensors"))


@pytest.mark.parametrize("other", [0.5, 0.4])
def test_a_file_of_weights_alone_has_the_preprocessing_that_the_tags_of_its_model_share(
    tiny_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: float
) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tiny_clip.state_dict().items()}, file)
    tags = {"one": {"mean": (0.5,) * 3, "url": "x"}, "two": {"mean": (other,) * 3, "url": "y"}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: [*tags] if model == TINY else [])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: tags[tag])
    view = load_record(EncoderConfig(model=TINY, pretrained=str(file))).view
    assert view == (OPENAI_VIEW.model_copy(update={"mean": (0.5,) * 3}) if other == 0.5 else OPENAI_VIEW)


def test_the_record_of_weights_is_that_of_the_loaded_weights_and_is_verified() -> None:
    record, weights = load_record(TOWER), load_weights(TOWER)
    assert record == TowerRecord(weights.sha256, weights.architecture, weights.view)
    rewritten(cached_path(TOWER), lambda state, metadata: metadata.pop("record_sha256"))
    with pytest.raises(WeightsError, match="delete the file"):
        load_record(TOWER)


class _Trap:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("content", ["pickle", "noise", "another model"])
def test_a_local_file_that_is_not_these_weights_is_refused_and_runs_no_code(
    tiny_clip: Any, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "weights.pt"
    if content == "pickle":
        torch.save({"state_dict": _Trap(tmp_path / "sprung")}, file)
    elif content == "noise":
        file.write_bytes(bytes(range(256)) * 10)
    else:
        torch.save({"visual.proj": torch.zeros(3, 3)}, file)
    with pytest.raises(WeightsError, match="Cannot load"):
        load_weights(EncoderConfig(model=TINY, pretrained=str(file)))
    assert not (tmp_path / "sprung").exists()


def test_the_contents_hash_covers_names_shapes_types_and_values_but_not_order_or_layout() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)}
    same = {"b": torch.tensor(1.0), "a": torch.arange(6.0).reshape(2, 3).T.contiguous().T}
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].reshape(3, 2), "b": state["b"]},
        {"a": state["a"].view(torch.int32), "b": state["b"]},
        {"a": state["a"], "b": torch.tensor(1.0 + 2**-23)},
        {"a": state["a"], "b": torch.tensor([1.0])},
        {"a": state["a"]},
    ]
    assert contents_sha256(same) == contents_sha256(state)
    assert len({contents_sha256(s) for s in [state, *others]}) == 7


def _load_at_once(barrier: Any, results: Any) -> None:
    barrier.wait(60)
    results.put(load_weights(TOWER).sha256)


def test_two_processes_that_fetch_at_the_same_time_get_the_same_weights(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=_load_at_once, args=(barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    hashes = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert hashes[0] == hashes[1] == load_weights(TOWER).sha256
    assert not list(cache.glob("*.tmp"))


def test_a_load_waits_while_another_one_fetches(cache: Path) -> None:
    cache.mkdir()
    waiting = threading.Thread(target=load_weights, args=(TOWER,))
    with FileLock(f"{cached_path(TOWER)}.lock"):
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not cached_path(TOWER).exists()
    waiting.join(30)
    assert not waiting.is_alive() and cached_path(TOWER).exists()


@pytest.mark.real_weights
def test_the_packaged_weights_are_clip_and_match_two_crops_of_a_photograph() -> None:
    from skimage import data

    from clipflow_ray.images import views
    from clipflow_ray.model.encoder import Encoder

    weights = load_weights(EncoderConfig())
    build_tower(weights.architecture).load_state_dict(weights.state, strict=True)
    assert weights.sha256 == PACKAGED_SHA256
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    crops = [photo[:-40, :-40] for photo in photos] + [photo[40:, 40:] for photo in photos]
    embeddings = Encoder(EncoderConfig())([views(crop, weights.view) for crop in crops])["projected@224"]
    norms = np.linalg.norm(embeddings, axis=1)
    assert embeddings.shape == (8, 512)
    assert norms.min() > 9.0 and norms.max() < 13.0
    unit = embeddings / norms[:, None]
    cosine = unit[:4] @ unit[4:].T
    assert np.diag(cosine).min() > cosine[~np.eye(4, dtype=bool)].max() + 0.1
