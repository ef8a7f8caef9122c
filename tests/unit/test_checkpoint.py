"""The checkpoint directory: saving and loading changes nothing, and altered, partial or foreign files are refused."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save, save_file
from scipy import stats

from clipflow_ray.config import (
    CHECKPOINTS,
    OPENAI_VIEW,
    TEST_TOWER,
    AuditConfig,
    EncoderConfig,
    FitConfig,
    FlowConfig,
    ImageLimits,
    ObjectiveConfig,
    ProxyConfig,
    Segment,
    SplitConfig,
    TrainConfig,
    ViewSpec,
    load_yaml,
)
from clipflow_ray.errors import CalibrationError, CheckpointError
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Calibrated, Checkpoint, load_checkpoint, save_checkpoint
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.record import TrainingRecord

ROOT = Path(__file__).parents[2]
HASH = "record_sha256"

FLOW = FlowConfig(blocks=2, hidden=8, translation_clamp=0.5)
TRAINING = TrainingRecord(
    input=("photos-é",),
    listing="l" * 16,
    objects=13,
    unreadable=1,
    config_hash="c" * 16,
    fit=FitConfig(epochs=2, seed=7),
    split=SplitConfig(validation=("lake",), held_out_family="tone"),
    split_by="source",
    views={"natural": 24},
    images={"natural": 12},
    sources={"natural": ("lake", "tower")},
    metrics={"epoch": 1.0, "auroc_tone": 0.75},
    history=({"epoch": 0.0, "auroc_tone": 0.5}, {"epoch": 1.0, "auroc_tone": 0.75}),
    tool_version="0.1.0",
    made_at="2026-01-01T00:00:00+00:00",
)
VIEW = ViewSpec(
    kind="crop",
    sizes=(336, 224),
    interpolation="bilinear",
    resize_mode="squash",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)
SEGMENTS = (
    Segment(feature="block1.cls", size=336, training="paired"),
    Segment(feature="block2.mean", size=224),
)
FURTHER = "calibration-bfloat16.safetensors"
FILES = ["checkpoint.json", "flow.safetensors", "calibration.safetensors", FURTHER, "reference.safetensors"]
each_file = pytest.mark.parametrize("name", FILES)


def whole(**changes: Any) -> Checkpoint:
    """A checkpoint in which no field has its default."""
    generator = torch.Generator().manual_seed(0)
    flow = Flow((6, 4), FLOW)
    with torch.no_grad():
        for tensor in [*flow.parameters(), flow.mean, flow.std, flow.centre, flow.spread]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    scores = np.random.default_rng(0).normal(1.4, 0.1, 30).astype(np.float32)
    checkpoint = Checkpoint(
        encoder=EncoderConfig(model=TEST_TOWER, pretrained="seed:3", view="crop"),
        encoder_fingerprint="0123456789abcdef",
        view=VIEW,
        segments=SEGMENTS,
        widths=(6, 4),
        flow_config=FLOW,
        flow_state=flow.state_dict(),
        limits=ImageLimits(max_bytes=1000, min_side=48),
        objective=ObjectiveConfig(kind="both", margin=0.7),
        proxies=ProxyConfig(
            seed=5, paired_quality=(60, 80), families={"low_pass": {"cutoff": (0.3, 0.4), "order": (2.0, 3.0)}}
        ),
        calibration=Calibration.fit(
            scores,
            ["jpeg|0-256", "png|256-512", "ünï|x"] * 10,
            ["lake", "harbour"] * 5 + ["töwer"] * 20,
            {"lake": 1.0, "harbour": 1.0, "töwer": 2.0},
        ),
        reference={
            "natural": torch.randn(7, 10, generator=generator).half(),
            "probe": torch.randn(11, generator=generator),
        },
        training=TRAINING,
        further={
            "bfloat16": Calibrated(
                "b" * 16,
                Calibration.fit(
                    scores[::-1] + np.float32(0.01), ["png|256-512", "ünï|x"] * 15, ["lake", "harbour"] * 15
                ),
            )
        },
    )
    return dataclasses.replace(checkpoint, **changes)


def plain(value: Any) -> Any:
    """A form that `==` compares: tensors and arrays as dtype, shape and bytes, dataclasses as dicts."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(whole(), tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_checkpoint_equals_the_saved_one(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert plain(loaded) == plain(whole())
    assert loaded.model_id == whole().model_id
    assert sorted(os.listdir(saved)) == sorted(FILES)
    assert sorted(os.listdir(saved.parent)) == ["model"]


def test_calibration_and_reference_may_be_absent(tmp_path: Path) -> None:
    bare = whole(calibration=None, reference={}, training=None, further={})
    save_checkpoint(bare, str(tmp_path / "new" / "folders" / "model"))
    loaded = load_checkpoint(str(tmp_path / "new" / "folders" / "model"))
    assert plain(loaded) == plain(bare)
    assert loaded.calibration is None


@pytest.mark.parametrize("sources", [None, ["lake", "harbour", "tower"] * 10])
def test_weights_of_sources_are_stored_only_if_they_differ(tmp_path: Path, sources: list[str] | None) -> None:
    scores = np.linspace(1.0, 2.0, 30, dtype=np.float32)
    plainer = whole(calibration=Calibration.fit(scores, ["jpeg|0-256"] * 30, sources))
    save_checkpoint(plainer, tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "calibration.safetensors")) == {"scores", "sources"}
    assert plain(load_checkpoint(tmp_path / "model")) == plain(plainer)
    save_checkpoint(whole(), tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "calibration.safetensors")) == {"scores", "sources", "weights"}


def test_no_name_of_a_calibration_source_is_stored_with_the_scores(saved: Path) -> None:
    content = (saved / "calibration.safetensors").read_bytes()
    assert not [name for name in ("lake", "harbour", "töwer") if name.encode() in content]


def test_a_calibration_from_before_sources_were_kept_gives_the_p_values_and_the_id_that_it_gave(saved: Path) -> None:
    scores = np.sort(np.random.default_rng(1).normal(1.4, 0.1, 30).astype(np.float32).round(2))
    old = save({"scores": torch.from_numpy(scores)})
    (saved / "calibration.safetensors").write_bytes(old)
    record = json.loads((saved / "checkpoint.json").read_text())
    record["sha256"]["calibration.safetensors"] = hashlib.sha256(old).hexdigest()
    del record[HASH]
    record[HASH] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (saved / "checkpoint.json").write_text(json.dumps(record))
    calibration = load_checkpoint(saved).calibration
    assert calibration is not None and calibration.source_count == 1
    digest = hashlib.sha256(scores.tobytes() + "\n".join(calibration.strata).encode())
    assert calibration.calibration_id == digest.hexdigest()[:16]
    asked = np.r_[scores, scores + 0.005, 0.0, 9.0].astype(np.float32)
    before = ((1.0 + (scores >= asked[:, None]).sum(axis=1)) / 31.0).astype(np.float32)
    assert calibration.p_value(asked).tobytes() == before.tobytes()
    assert calibration.unseen_source(0.05) is None
    assert "does not know its sources" in " ".join(calibration.in_words(0.05))


def test_a_relative_path_works_like_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(whole(), "model")
    assert plain(load_checkpoint("model")) == plain(load_checkpoint(tmp_path / "model"))


def test_the_rebuilt_flow_scores_as_the_trained_one(saved: Path) -> None:
    embeddings = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    trained = Flow((6, 4), FLOW)
    trained.load_state_dict(load_file(saved / "flow.safetensors"))
    rebuilt = load_checkpoint(saved).flow()
    with torch.no_grad():
        for field in ("total", "score"):
            found, expected = (getattr(flow(embeddings), field) for flow in (rebuilt, trained))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not rebuilt.training and not any(p.requires_grad for p in rebuilt.parameters())


def test_saving_over_a_checkpoint_replaces_all_its_files(saved: Path) -> None:
    newer = whole(calibration=None, reference={}, encoder_fingerprint="f" * 16, further={})
    save_checkpoint(newer, saved)
    assert plain(load_checkpoint(saved)) == plain(newer)
    assert sorted(os.listdir(saved)) == ["checkpoint.json", "flow.safetensors"]
    assert os.listdir(saved.parent) == ["model"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_other_file(saved: Path) -> None:
    with pytest.raises(ValidationError):
        save_checkpoint(whole(training=object()), saved)
    assert plain(load_checkpoint(saved)) == plain(whole())
    assert os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize("content", [None, "holiday.jpg", "checkpoint.json"])
def test_a_folder_that_is_not_a_checkpoint_is_never_deleted(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    if content:
        (folder / content).write_bytes(b'{"mine": true}')
    with pytest.raises(CheckpointError):
        save_checkpoint(whole(), folder)
    assert os.listdir(folder) == ([content] if content else [])
    if content:
        assert (folder / content).read_bytes() == b'{"mine": true}'
    assert os.listdir(tmp_path) == ["photos"], "a refused save leaves nothing behind"


@each_file
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint|lacks"):
        load_checkpoint(saved)


@each_file
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(saved: Path, name: str, fraction: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


@each_file
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.1, 0.33, 0.5, 0.7, 0.9, 1.0])
def test_a_file_with_one_bit_flipped_is_refused(saved: Path, name: str, fraction: float) -> None:
    data = bytearray((saved / name).read_bytes())
    data[int((len(data) - 1) * fraction)] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


def altered(saved: Path, *keys: str, value: Any) -> None:
    record = json.loads((saved / "checkpoint.json").read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    assert place[keys[-1]] != value
    place[keys[-1]] = value
    (saved / "checkpoint.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("flow", "clamp"), 1.8),
        (("encoder", "view"), "resize"),
        (("view", "sizes"), [224]),
        (("encoder_fingerprint",), "f" * 16),
        (("widths",), [5, 5]),
        (("segments",), []),
        (("limits", "max_pixels"), 10**12),
        (("calibration_strata",), ["jpeg|0-256"]),
        (("model_id",), "0" * 16),
        (("sha256",), {}),
        (("sha256",), []),
    ],
)
def test_a_record_whose_fields_were_changed_is_refused(saved: Path, keys: tuple[str, ...], value: Any) -> None:
    altered(saved, *keys, value=value)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


@pytest.mark.parametrize("version", [0, 5, "1", None])
def test_an_unknown_format_version_is_refused(saved: Path, version: object) -> None:
    altered(saved, "format_version", value=version)
    with pytest.raises(CheckpointError, match="format version"):
        load_checkpoint(saved)


def made_older(saved: Path, version: int) -> Checkpoint:
    """Rewrite the files in `saved` as a release of format `version` did, and return the checkpoint that they hold."""
    record = json.loads((saved / "checkpoint.json").read_text())
    state = {name: value for name, value in whole().flow_state.items() if name not in ("centre", "spread")}
    save_file(state, saved / "flow.safetensors")
    record["sha256"]["flow.safetensors"] = hashlib.sha256((saved / "flow.safetensors").read_bytes()).hexdigest()
    record["format_version"] = version
    del record["further"], record["sha256"][FURTHER]
    (saved / FURTHER).unlink()
    record["encoder"]["feature"] = ["block1.cls", "block2.mean"]
    record["segments"] = record.pop("widths")
    record["view"] = {name: value for name, value in record["view"].items() if name != "sizes"} | {"size": 336}
    del record["proxies"]["paired_quality"], record["record_sha256"]
    if version == 1:
        del record["view"], record["encoder"]["precision"]
    record["record_sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (saved / "checkpoint.json").write_text(json.dumps(record))
    size = 224 if version == 1 else 336
    one_size: dict[str, Any] = {"sizes": (size,)}
    view = OPENAI_VIEW.model_copy(update={"kind": "crop"}) if version == 1 else VIEW.model_copy(update=one_size)
    segments = tuple(Segment(feature=name, size=size) for name in ("block1.cls", "block2.mean"))
    proxies = whole().proxies.model_copy(update={"paired_quality": ProxyConfig().paired_quality})
    return whole(view=view, segments=segments, flow_state=state, proxies=proxies, further={})


@pytest.mark.parametrize("version", [1, 2])
def test_the_features_of_an_older_record_are_plain_segments_of_its_one_view(saved: Path, version: int) -> None:
    expected = made_older(saved, version)
    loaded = load_checkpoint(saved)
    assert plain(loaded) == plain(expected)
    assert [each.name for each in loaded.segments] == [
        f"{name}@{224 if version == 1 else 336}" for name in ("block1.cls", "block2.mean")
    ]
    assert loaded.encoder.precision == "float32"
    digest = hashlib.sha256(loaded.encoder_fingerprint.encode() + save(expected.flow_state))
    assert loaded.model_id == digest.hexdigest()[:16]  # as the release that wrote it computed it


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_the_score_of_an_older_checkpoint_is_its_negative_log_likelihood_per_dimension(
    saved: Path, version: int
) -> None:
    made_older(saved, version)
    flow = load_checkpoint(saved).flow().double()
    embeddings = torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    latent, log_det = flow.transform(flow.standardize(embeddings))
    log_likelihood = stats.norm.logpdf(latent.numpy()).sum(axis=1) + log_det.sum(dim=1).numpy()
    assert np.ptp(log_likelihood) > 1.0
    np.testing.assert_allclose(flow(embeddings).score, -log_likelihood / 10, rtol=1e-7)


def test_a_checkpoint_of_format_version_3_has_its_one_precision(saved: Path) -> None:
    record = json.loads((saved / "checkpoint.json").read_text())
    del record["further"], record["sha256"][FURTHER], record[HASH]
    (saved / FURTHER).unlink()
    record["format_version"] = 3
    record[HASH] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (saved / "checkpoint.json").write_text(json.dumps(record))
    loaded = load_checkpoint(saved)
    assert plain(loaded) == plain(whole(further={}))
    assert loaded.precisions == ("float32",) and loaded.model_id == whole().model_id
    with pytest.raises(CalibrationError, match="is calibrated for float32, not for bfloat16"):
        loaded.at("bfloat16")


def test_a_checkpoint_at_another_precision_has_its_encoder_and_calibration_and_stays_the_same_model() -> None:
    base = whole()
    half = base.at("bfloat16")
    assert (half.encoder.precision, half.encoder_fingerprint) == ("bfloat16", "b" * 16)
    assert plain(half.calibration) == plain(base.further["bfloat16"].calibration)
    assert (base.precisions, half.precisions) == (("float32", "bfloat16"), ("bfloat16", "float32"))
    assert half.model_id == base.model_id
    assert plain(half.at("float32")) == plain(half.as_trained) == plain(base.at("float32")) == plain(base)
    for fingerprint, precision in ((base.encoder_fingerprint, "float32"), ("b" * 16, "bfloat16")):
        assert base.of_encoder(fingerprint).encoder.precision == precision
        assert half.of_encoder(fingerprint).encoder.precision == precision
    assert half.of_encoder("0" * 16) is half


def test_a_checkpoint_is_stored_at_the_precision_of_its_training_whichever_is_chosen(tmp_path: Path) -> None:
    save_checkpoint(whole().at("bfloat16"), tmp_path / "model")
    assert plain(load_checkpoint(tmp_path / "model")) == plain(whole())
    # `calibrate` on a finished audit leaves the calibration of one precision only.
    half = whole(further={"bfloat16": whole().further["bfloat16"]}, calibration=None)
    save_checkpoint(half.at("bfloat16"), tmp_path / "half")
    loaded = load_checkpoint(tmp_path / "half")
    assert (loaded.encoder.precision, loaded.calibration, loaded.precisions) == ("float32", None, ("bfloat16",))
    assert loaded.model_id == loaded.at("bfloat16").model_id == whole().model_id


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_checkpoint_that_is_saved_again_is_the_same_in_the_current_version(saved: Path, version: int) -> None:
    made_older(saved, version)
    loaded = load_checkpoint(saved)
    save_checkpoint(loaded, saved)
    assert json.loads((saved / "checkpoint.json").read_text())["format_version"] == 4
    assert plain(load_checkpoint(saved)) == plain(loaded)


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\xfe\x00", b"{", b"null", b"[]", b"3", b'"x"', b'{"format_version": 1}', b"[" * 100_000]
)
def test_a_malformed_record_is_refused(saved: Path, garbage: bytes) -> None:
    (saved / "checkpoint.json").write_bytes(garbage)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


def test_a_path_without_a_checkpoint_raises_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="directory that training wrote"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["flow", "reference"])
def test_tensors_that_are_not_finite_are_refused(tmp_path: Path, field: str, bad: float) -> None:
    checkpoint = whole()
    tensors = {"flow": checkpoint.flow_state["blocks.1.subnet.2.weight"], "reference": checkpoint.reference["natural"]}
    tensors[field].view(-1)[3] = bad
    with pytest.raises(CheckpointError, match="finite"):
        save_checkpoint(checkpoint, tmp_path / "model")
        load_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_flow_tensors_that_do_not_fit_the_config_are_refused(change: str) -> None:
    state = dict(whole().flow_state)
    if change == "missing":
        del state["blocks.1.log_scale"]
    elif change == "extra":
        state["blocks.2.log_scale"] = torch.zeros(10)
    else:
        state["mean"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match="do not fit"):
        whole(flow_state=state).flow()


def test_the_model_id_depends_on_weights_and_encoder_but_not_on_the_calibration() -> None:
    base = whole()
    state = {name: tensor.clone() for name, tensor in base.flow_state.items()}
    state["mean"][0] += 1e-6
    others = [whole(flow_state=state), whole(encoder_fingerprint="f" * 16)]
    assert len({base.model_id, *(other.model_id for other in others)}) == 3
    assert whole(calibration=None, training=None).model_id == base.model_id
    assert whole(flow_state=dict(reversed(base.flow_state.items()))).model_id == base.model_id


def test_pickling_does_not_change_a_checkpoint() -> None:
    assert plain(pickle.loads(pickle.dumps(whole()))) == plain(whole())


def test_the_repr_of_a_checkpoint_holds_no_tensor() -> None:
    assert "tensor" not in repr(whole())


def test_a_copied_checkpoint_is_the_same_checkpoint(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert plain(load_checkpoint(tmp_path / "elsewhere")) == plain(load_checkpoint(saved))


@pytest.mark.parametrize(("name", "segments"), [("default", 3), ("fast", 2)])
def test_the_config_of_the_packaged_training_is_what_a_packaged_checkpoint_was_made_with(
    name: str, segments: int
) -> None:
    config = load_yaml(TrainConfig, str(ROOT / "jobs/train_default.yaml"), {"output": "anywhere"})
    packaged = load_checkpoint(name)
    assert config.encoder == packaged.encoder and config.proxies == packaged.proxies
    assert config.segments[:segments] == packaged.segments and len(packaged.segments) == segments
    assert set(packaged.precisions) == {"float32", "bfloat16"}
    assert packaged.calibration is not None
    assert packaged.calibration.source_count == len(config.split.calibration) >= 75
    assert len(packaged.calibration.scores) >= 600
    assert config.flow == packaged.flow_config and config.objective == packaged.objective
    assert packaged.training is not None
    assert config.split == packaged.training.split
    assert config.fit == packaged.training.fit


def test_a_record_with_an_unknown_field_is_refused_even_with_the_right_hash(saved: Path) -> None:
    path = saved / "checkpoint.json"
    for change in ({"something": 1}, {"training": {**json.loads(path.read_text())["training"], "something": 1}}):
        plain = {name: value for name, value in (json.loads(path.read_text()) | change).items() if name != HASH}
        plain[HASH] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        elsewhere = saved.with_name("changed")
        shutil.copytree(saved, elsewhere, dirs_exist_ok=True)
        (elsewhere / "checkpoint.json").write_text(json.dumps(plain))
        with pytest.raises(CheckpointError, match="something"):
            load_checkpoint(elsewhere)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_packaged_checkpoint_does_not_change_if_it_is_written_again(tmp_path: Path, name: str) -> None:
    packaged = load_checkpoint(name)
    save_checkpoint(packaged, tmp_path / "model")
    assert plain(load_checkpoint(tmp_path / "model")) == plain(packaged)
    assert packaged.model_id == json.loads(Path(CHECKPOINTS[name], "checkpoint.json").read_text())["model_id"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_packaged_checkpoint_stays_below_ten_megabytes(name: str) -> None:
    assert sum(file.stat().st_size for file in Path(CHECKPOINTS[name]).iterdir()) < 10_000_000


def test_the_name_of_a_packaged_checkpoint_comes_before_a_folder_of_that_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "fast")
    monkeypatch.chdir(tmp_path)
    assert AuditConfig(output="out", checkpoint="fast").checkpoint == CHECKPOINTS["fast"]
    assert load_checkpoint("fast").model_id == load_checkpoint(CHECKPOINTS["fast"]).model_id
    assert AuditConfig(output="out", checkpoint="./fast").checkpoint == "./fast"
    assert load_checkpoint("./fast").model_id == load_checkpoint(saved).model_id


def test_the_outputs_of_a_checkpoint_name_each_feature_and_size_once() -> None:
    again = Segment(feature="block1.cls", size=336)
    checkpoint = whole(segments=(*SEGMENTS, again), widths=(6, 4, 6))
    assert [each.name for each in checkpoint.outputs] == ["block1.cls@336", "block2.mean@224"]
