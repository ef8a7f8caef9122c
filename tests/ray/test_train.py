"""Training end to end on a real cluster, with the test tower."""

import glob
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from clipflow_ray.config import InventoryOptions, TrainConfig
from clipflow_ray.errors import ConfigError, ResourceError, TrainingError
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.train import features, fit
from clipflow_ray.train.loop import SELECTION, Loop, source_separation
from clipflow_ray.train.run import train
from clipflow_ray.train.split import split
from tests.conftest import SOURCES

SCALE = ("centre", "spread")  # fitted after the weights, on the calibration


def _changed(config: TrainConfig, **fit_changes: object) -> TrainConfig:
    return config.model_copy(update={"fit": config.fit.model_copy(update=fit_changes)})


def _split(config: TrainConfig, **changes: object) -> TrainConfig:
    return config.model_copy(update={"split": config.split.model_copy(update=changes)})


def test_a_checkpoint_carries_all_that_a_detector_needs(trained: str, naturals: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint.calibration is not None
    assert len(checkpoint.calibration.scores) == 32
    assert checkpoint.training is not None
    assert checkpoint.training.sources["calibration"] == ("harbour", "studio")
    assert checkpoint.training.split.held_out_family == "low_pass"
    data = (naturals / "alpine" / "000.jpg").read_bytes()
    finding = Detector(checkpoint).detect(data, alpha=0.1)
    assert finding.status == "ok"
    assert str(naturals) not in checkpoint.training.model_dump_json()


def test_calibration_images_are_the_sources_that_training_never_saw(trained: str, tiny: TrainConfig) -> None:
    run = features.extract(tiny)
    data = split(features.load(run, tiny.segments, tiny.proxies), tiny.split)
    groups = [set(part.group) for part in (data.natural, data.validation_natural, data.calibration)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert "low_pass" not in set(data.proxy.family)
    assert set(data.held_out.family) == {"low_pass"}
    scores = Detector.from_checkpoint(trained).score_embeddings(data.calibration.embedding).score
    fitted = load_checkpoint(trained).calibration
    assert fitted is not None
    np.testing.assert_allclose(np.sort(scores), fitted.scores, rtol=1e-5, atol=1e-5)


def test_embeddings_are_reused_if_nothing_changed_and_made_again_if_the_input_did(
    trained: str, tiny: TrainConfig, naturals: Path, tmp_path: Path
) -> None:
    run = features.extract(tiny)
    files = {path: path.stat().st_mtime_ns for path in Path(run.place.uri).rglob("*.parquet")}
    assert features.extract(tiny).place.uri == run.place.uri
    assert files == {path: path.stat().st_mtime_ns for path in Path(run.place.uri).rglob("*.parquet")}
    extra = tmp_path / "more"
    extra.mkdir()
    (extra / "one.jpg").write_bytes((naturals / "alpine" / "000.jpg").read_bytes())
    wider = tiny.model_copy(update={"input": (str(naturals), str(extra))})
    assert features.extract(wider).place.uri != run.place.uri


@pytest.mark.stress  # test_evaluate.py has lists and tables as inputs, which are read by the same code
def test_a_table_of_images_gives_the_sources_and_the_natural_views_of_the_files_in_it(
    trained: str, tiny: TrainConfig, naturals: Path, tmp_path: Path
) -> None:
    images = [{"jpg": path.read_bytes(), "place": path.parent.name} for path in sorted(naturals.rglob("*.jpg"))]
    pq.write_table(pa.Table.from_pylist(images), tmp_path / "naturals.parquet")
    listed = tiny.model_copy(
        update={
            "input": (str(tmp_path / "naturals.parquet"),),
            "output": str(tmp_path / "out"),
            "inventory": InventoryOptions(bytes_column="jpg", group_column="place"),
        }
    )
    of_table, of_files = (features.load(features.extract(each), tiny.segments, tiny.proxies) for each in (listed, tiny))
    assert set(of_table.group) == set(of_files.group) == set(SOURCES)
    for source in SOURCES:
        # the first natural view does not depend on the row id, which differs
        table, files = (
            each.embedding[(each.group == source) & (each.family == "natural") & (each.view == 0)]
            for each in (of_table, of_files)
        )
        assert len(table) == 16
        np.testing.assert_allclose(table[np.argsort(table[:, 0])], files[np.argsort(files[:, 0])], atol=1e-5)


def test_every_image_has_its_natural_views_and_proxies(trained: str, tiny: TrainConfig) -> None:
    run = features.extract(tiny)
    table = pq.read_table(f"{run.place.uri}/embeddings")
    for row in table.select(["group", "families", "projected@224"]).to_pylist():
        plain = row["group"] in tiny.split.calibration
        views = 1 if plain else tiny.proxies.natural_views * (1 + tiny.proxies.proxies_per_view)
        assert len(row["families"]) == views
        assert row["families"].count("natural") == (1 if plain else tiny.proxies.natural_views)
        assert len(row["projected@224"]) == views * 32


def test_one_worker_of_ray_train_gives_the_weights_of_the_loop_without_ray(trained: str, tiny: TrainConfig) -> None:
    weights = load_checkpoint(trained).flow_state
    loop = _undisturbed(tiny)
    best = max(figures[SELECTION] for figures, _ in loop)
    # Few proxies are held out, so several epochs may have the same figure.
    equally_good = [state for figures, state in loop if figures[SELECTION] == best]
    assert any(
        all(torch.equal(weights[name], state[name].to(weights[name].dtype)) for name in weights if name not in SCALE)
        for state in equally_good
    )


def test_a_checkpoint_holds_half_precision_and_is_calibrated_to_the_flow_that_it_holds(
    trained: str, tiny: TrainConfig
) -> None:
    checkpoint = load_checkpoint(trained)
    state = checkpoint.flow_state
    kinds = {t.dtype for name, t in state.items() if not name.endswith("permutation") and name not in SCALE}
    assert kinds == {torch.float16} and {state[name].dtype for name in SCALE} == {torch.float32}
    data = split(features.load(features.extract(tiny), tiny.segments, tiny.proxies), tiny.split)
    with torch.inference_mode():
        result = checkpoint.flow().double()(torch.from_numpy(data.calibration.embedding).double())
    assert checkpoint.calibration is not None
    assert np.array_equal(np.sort(result.score.float().numpy()), checkpoint.calibration.scores)
    assert checkpoint.calibration.scores.mean() == pytest.approx(0, abs=1e-5)
    assert checkpoint.calibration.scores.std() == pytest.approx(1, abs=1e-5)


def test_the_figures_of_an_epoch_can_be_computed_from_the_flow_again(trained: str, tiny: TrainConfig) -> None:
    data = split(features.load(features.extract(tiny), tiny.segments, tiny.proxies), tiny.split)
    loop = Loop(tiny, data, (32,))
    figures = loop.epoch(0)
    with torch.inference_mode():
        results = [
            loop.flow.eval()(torch.from_numpy(part.embedding))
            for part in (data.validation_natural, data.held_out, data.calibration)
        ]
    natural, held_out, calibration = (result.score.numpy() for result in results)
    per_dim, _, calibrating = (result.per_dim.double().numpy() for result in results)
    # one segment, standardised by the calibration
    assert natural == pytest.approx((calibrating.mean() - per_dim) / calibrating.std(), abs=1e-4)
    assert figures["nll_natural_median"] == pytest.approx(np.median(-per_dim), abs=1e-6)
    pairs = held_out[:, None] - natural[None, :]
    assert (
        figures["auroc_low_pass"] == figures["selection"] == pytest.approx(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    )
    plain = data.validation_natural.view == 0
    scores = np.r_[natural[plain], calibration]
    groups = np.r_[data.validation_natural.group[plain], data.calibration.group]
    assert figures["auroc_sources"] == pytest.approx(source_separation(scores, groups), abs=1e-6)


def test_another_seed_gives_other_weights(trained: str, tiny: TrainConfig) -> None:
    data = split(features.load(features.extract(tiny), tiny.segments, tiny.proxies), tiny.split)
    loops = [Loop(_changed(tiny, seed=seed), data, (32,)) for seed in (0, 0, 1)]
    for loop in loops:
        loop.epoch(0)
    one, same, other = (loop.flow.state_dict() for loop in loops)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.stress
def test_two_workers_reach_the_figures_of_one_within_the_spread_of_seeds(
    trained: str, tiny: TrainConfig, tmp_path: Path
) -> None:
    run = features.extract(tiny)
    here = tiny.model_copy(update={"output": str(tmp_path)})
    single = [fit.fit(_changed(here, seed=seed), run, (32,)).history[-1] for seed in range(3)]
    double = fit.fit(_changed(here, workers=2), run, (32,)).history[-1]
    for name in ("auroc_seen", "nll_natural"):
        values = [metrics[name] for metrics in single]
        spread = max(values) - min(values)
        assert abs(double[name] - np.mean(values)) <= max(2 * spread, 0.03), (name, values, double[name])


def test_a_killed_training_worker_is_replaced_and_the_result_is_that_of_an_undisturbed_loop(
    trained: str, tiny: TrainConfig, tmp_path: Path
) -> None:
    run = features.extract(tiny)
    longer = _changed(tiny, epochs=12)
    undisturbed = _undisturbed(longer)
    killed: list[int] = []
    epochs_after: list[int] = []
    done = threading.Event()

    def kill_the_worker_after_three_epochs_and_record_later_epochs() -> None:
        seen: set[Path] = set()
        while not done.is_set():
            # Ray deletes older checkpoints at any moment, which `glob` tolerates and `Path.rglob` does not.
            for path in map(Path, sorted(glob.glob(f"{tmp_path}/**/state.json", recursive=True))):
                if path not in seen and (epoch := _epoch(path)) is not None:
                    seen.add(path)
                    if killed:
                        epochs_after.append(epoch)
                    elif epoch >= 3:  # a report waits until Ray has the one before: epoch 1 is registered
                        for pid in _processes("RayTrainWorker"):
                            os.kill(pid, signal.SIGKILL)
                            killed.append(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_worker_after_three_epochs_and_record_later_epochs)
    killer.start()
    try:
        survived = fit.fit(longer.model_copy(update={"output": str(tmp_path)}), run, (32,))
    finally:
        done.set()
        killer.join()
    assert killed
    assert epochs_after and 0 not in epochs_after, "the run started over instead of resuming"
    # The chosen epoch may come before the kill. The last epoch shows that the resumed training is right.
    chosen = undisturbed[int(survived.metrics["epoch"])][1]
    for flow, expected in ((survived.flow_state, chosen), (_last_flow(tmp_path, epoch=11), undisturbed[-1][1])):
        for name, value in expected.items():
            torch.testing.assert_close(flow[name], value, atol=1e-6, rtol=1e-6 if name in SCALE else 0)


def test_more_workers_than_the_cluster_has_cpus_are_refused_before_start(trained: str, tiny: TrainConfig) -> None:
    run = features.extract(tiny)
    with pytest.raises(ResourceError, match=r"fit\.workers"):
        fit.fit(_changed(tiny, workers=64), run, (32,))


def test_an_unknown_source_or_family_in_the_split_is_refused_by_name(trained: str, tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="atlantis"):
        features.extract(_split(tiny, validation=("atlantis",)))
    loaded = features.load(features.extract(tiny), tiny.segments, tiny.proxies)
    with pytest.raises(ConfigError, match="no_family"):
        split(loaded, tiny.split.model_copy(update={"held_out_family": "no_family"}))


def test_a_calibration_that_is_too_small_is_refused_before_anything_is_encoded(
    trained: str, tiny: TrainConfig, tmp_path: Path
) -> None:
    elsewhere = tiny.model_copy(update={"output": str(tmp_path / "out")})
    with pytest.raises(TrainingError, match="it would have 16 from 1"):
        train(_split(elsewhere, calibration=("harbour",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.stress
def test_a_loss_that_is_not_finite_fails_the_training_with_a_sentence(
    trained: str, tiny: TrainConfig, tmp_path: Path
) -> None:
    run = features.extract(tiny)
    wild = _changed(tiny, learning_rate=1e30, max_failures=0).model_copy(update={"output": str(tmp_path)})
    with pytest.raises(TrainingError):
        fit.fit(wild, run, (32,))


def test_an_unchanged_config_trains_nothing_twice(trained: str, tiny: TrainConfig) -> None:
    before = sorted(Path(tiny.output, "fit").rglob("flow.safetensors"))
    assert train(tiny).model_id == load_checkpoint(trained).model_id
    assert sorted(Path(tiny.output, "fit").rglob("flow.safetensors")) == before


def _undisturbed(config: TrainConfig) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """Figures and weights after each epoch, without Ray."""
    loop = Loop(
        config, split(features.load(features.extract(config), config.segments, config.proxies), config.split), (32,)
    )
    epochs = range(config.fit.epochs)
    return [(loop.epoch(at), {name: value.clone() for name, value in loop.flow.state_dict().items()}) for at in epochs]


def _last_flow(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    (path,) = (path for path in folder.rglob("state.json") if _epoch(path) == epoch)
    return load_file(path.with_name("flow.safetensors"))


def _epoch(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text())["epoch"])
    except (OSError, ValueError):  # still being written, or deleted already
        return None


def _processes(title: str) -> list[int]:
    """Pids of this process's descendants whose title contains `title`, so that no other Ray cluster is touched."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title in line and _descends(int(entry.name)):
                found.append(int(entry.name))
    return found


def _descends(pid: int) -> bool:
    while pid > 1 and pid != os.getpid():
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
        except OSError:
            return False
    return pid == os.getpid()
