"""Experiments on real embeddings of the tiny training, on a real cluster."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from scipy import stats

from clipflow_ray.config import (
    Candidate,
    ExperimentConfig,
    FitConfig,
    ObjectiveConfig,
    Segment,
    TrainConfig,
    load_yaml,
)
from clipflow_ray.errors import ConfigError
from clipflow_ray.lab.experiment import _held_out_figures, experiment, rank_correlation, summarized
from clipflow_ray.lab.record import ExperimentResult, FitRow
from clipflow_ray.train import features
from tests.ray.conftest import EXTRA

FIT = FitConfig(epochs=2, batch_size=32, learning_rate=2e-3)


@pytest.fixture(scope="module")
def config(tiny: TrainConfig) -> ExperimentConfig:
    return ExperimentConfig(
        train=tiny.model_copy(update={"fit": FIT}),
        held_out=("low_pass", "tone"),
        seeds=(0, 1),
        candidates=(
            Candidate(name="as it is"),
            Candidate(name="without resample", without=("resample",)),
            Candidate(name="too fast", fit=FIT.model_copy(update={"learning_rate": 1e30})),
        ),
        test_auroc={"as it is": 0.7, "too fast": 0.6},
    )


@pytest.fixture(scope="module")
def first(trained: str, config: ExperimentConfig) -> ExperimentResult:
    """The first experiment. It uses the embeddings of the tiny training, so that one runs first."""
    return experiment(config)


def test_every_candidate_is_fitted_once_for_each_family_and_seed(first: ExperimentResult) -> None:
    rows = pq.read_table(first.results).to_pylist()
    assert sorted((row["candidate"], row["held_out"], row["seed"]) for row in rows) == sorted(
        (name, family, seed)
        for name in ("as it is", "without resample", "too fast")
        for family in ("low_pass", "tone")
        for seed in (0, 1)
    )
    for row in rows:
        if row["candidate"] == "too fast":
            assert "learning rate" in row["error"] and row["auroc"] is None
        else:
            assert row["error"] is None and 0.0 <= row["tpr_5"] <= 1.0 and 0.3 < row["auroc"] <= 1.0
            assert 0.5 <= row["auroc_sources"] <= 1.0


def test_the_figures_change_with_a_candidates_settings_and_with_the_seed(first: ExperimentResult) -> None:
    rows = {(r["candidate"], r["held_out"], r["seed"]): r for r in pq.read_table(first.results).to_pylist()}
    for family in ("low_pass", "tone"):
        one, other_seed = rows["as it is", family, 0], rows["as it is", family, 1]
        without = rows["without resample", family, 0]
        assert len({row["nll_median"] for row in (one, other_seed, without)}) == 3


def test_the_summary_is_the_mean_of_its_rows_and_puts_failures_last(first: ExperimentResult) -> None:
    rows = pq.read_table(first.results).to_pylist()
    assert [line.candidate for line in first.summary][-1] == "too fast"
    failed = first.summary[-1].failed
    assert failed is not None and "learning rate" in failed
    for line in first.summary[:-1]:
        own = [row["auroc"] for row in rows if row["candidate"] == line.candidate]
        assert line.auroc == pytest.approx(np.mean(own)) and line.auroc_sd is not None and line.auroc_sd >= 0.0
        assert line.worst_auroc == min(line.families.values())


def test_the_page_names_each_candidate_and_loads_nothing(first: ExperimentResult) -> None:
    text = Path(first.page).read_text()
    assert all(name in text for name in ("as it is", "without resample", "too fast"))
    assert text.count("<svg") == text.count("</figure>") == 5  # ranking, families, and one for each signal
    for signal in ("AUROC on held-out families", "recall of held-out families", "AUROC between natural sources"):
        assert re.search(f"{signal}[^;.]* none: fewer than three candidates", text)
    assert "default-src 'none'" in text and not re.search(r"(src|href)=\"https?:", text.replace("xlink:href", ""))


def test_a_second_run_does_only_what_is_new_and_a_changed_candidate_is_fitted_anew(
    first: ExperimentResult, config: ExperimentConfig
) -> None:
    folder = Path(first.results).parent / "fits"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    grown = config.model_copy(
        update={
            "candidates": (
                *config.candidates[:1],
                Candidate(name="renamed", without=("resample",)),
                Candidate(name="natural alone", objective=ObjectiveConfig(kind="natural")),
                Candidate(name="paired", segments=EXTRA),
            ),
            "seeds": (0,),
            "test_auroc": {},
        }
    )
    second = experiment(grown)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4
    assert {line.candidate for line in second.summary} == {"as it is", "renamed", "natural alone", "paired"}
    assert not [line.failed for line in second.summary if line.failed]


def test_an_unknown_family_or_feature_is_refused_with_those_there_are(
    first: ExperimentResult, config: ExperimentConfig
) -> None:
    for change in (
        {"held_out": ("sepia",)},
        {"candidates": (Candidate(name="a", segments=(Segment(feature="block99.cls"),)),)},
    ):
        with pytest.raises(ConfigError, match=r"sepia|block99\.cls"):
            experiment(config.model_copy(update={**change, "test_auroc": {}}))


def test_two_candidates_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("train: {output: here}\ncandidates: [{name: a}, {name: a}]\n")
    with pytest.raises(ConfigError, match="need different names"):
        load_yaml(ExperimentConfig, str(path), {})


def test_the_rank_correlation_is_spearmans_over_the_candidates_with_a_test_auroc() -> None:
    values = {"a": (0.6, 0.9, 0.7), "b": (0.7, 0.8, None), "c": (0.8, 0.7, 0.9), "d": (0.9, 0.6, 0.8)}
    rows = [
        FitRow(
            key=name,
            candidate=name,
            held_out="f",
            seed=0,
            nll_median=1.0,
            auroc_seen=1.0,
            **dict(zip(("auroc", "tpr_5", "auroc_sources"), figures, strict=True)),
        )
        for name, figures in values.items()
    ]
    test_auroc = {"a": 0.71, "b": 0.70, "c": 0.75}
    expected = stats.spearmanr([0.6, 0.7, 0.8], [0.71, 0.70, 0.75]).statistic
    summary = summarized(rows)
    assert rank_correlation(summary, test_auroc) == pytest.approx((expected, 3))
    assert rank_correlation(summary, test_auroc, "tpr_5") == pytest.approx((-expected, 3))
    assert rank_correlation(summary, {"a": 0.7, "b": 0.8}) is None
    assert rank_correlation(summary, test_auroc, "auroc_sources") is None  # candidate b has no such figure
    assert rank_correlation(summary, test_auroc, "nll_median") is None  # all values are equal
    assert rank_correlation(summary, test_auroc | {"d": 0.73}, "auroc_sources") == pytest.approx((1.0, 3))


def test_a_family_that_no_image_drew_fails_its_fit_with_a_sentence(trained: str, tiny: TrainConfig) -> None:
    loaded = features.load(features.extract(tiny), tiny.segments, tiny.proxies)
    held_out = tiny.model_copy(update={"split": tiny.split.model_copy(update={"held_out_family": "tone"})})
    row = ray.get(_held_out_figures.remote(held_out, loaded.where(loaded.family != "tone"), (32,), ()))
    assert row.error is not None and "No proxies of family 'tone'" in row.error and row.auroc is None
