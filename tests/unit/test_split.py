"""The split of rows and the figures of validation, on features made by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from clipflow_ray.config import FlowConfig, SplitConfig
from clipflow_ray.errors import ConfigError, TrainingError
from clipflow_ray.lab.experiment import _without_families
from clipflow_ray.model.flow import Flow
from clipflow_ray.train.features import Features
from clipflow_ray.train.loop import source_separation, validate
from clipflow_ray.train.split import split

KINDS = ("natural", "tone", "low_pass", "tone+low_pass", "tone+resample")
PARTS = {"a": "training", "b": "validation", "c": "calibration"}
SPLIT = SplitConfig(held_out_family="low_pass")


def features() -> Features:
    """One row of each kind in each of three sources."""
    group, family = (column.ravel() for column in np.meshgrid(("a", "b", "c"), KINDS, indexing="ij"))
    count = len(group)
    return Features(
        embedding=np.zeros((count, 4), np.float32),
        row_id=np.arange(count).astype(str),
        group=group,
        stratum=np.full(count, ""),
        part=np.array([PARTS[source] for source in group]),
        family=family,
        view=np.zeros(count, np.int64),
    )


def test_a_proxy_of_a_pair_with_the_held_out_family_is_in_no_part() -> None:
    data = split(features(), SPLIT)
    assert sorted(data.proxy.family) == sorted(data.validation_proxy.family) == ["tone", "tone+resample"]
    assert list(data.held_out.family) == ["low_pass"]
    kept = split(features(), SPLIT.model_copy(update={"held_out_family": None}))
    assert sorted(kept.proxy.family) == sorted(set(KINDS) - {"natural"})


def test_a_pair_of_families_cannot_be_held_out() -> None:
    for name in ("tone+low_pass", "pairs"):
        with pytest.raises(ConfigError, match=r"there are: low_pass, tone\."):
            split(features(), SPLIT.model_copy(update={"held_out_family": name}))


def test_a_part_that_is_empty_is_named() -> None:
    for part, names in (
        ("validation", "validation_natural, validation_proxy, held_out"),
        ("training", "natural, proxy"),
    ):
        kept = features()
        kept.part[kept.part == part] = "calibration"
        with pytest.raises(TrainingError, match=f"Nothing is left for {names}: give more images"):
            split(kept, SPLIT)


def test_pairs_have_one_figure_of_their_own() -> None:
    drawn = features()
    drawn.embedding[:] = np.random.default_rng(0).standard_normal(drawn.embedding.shape)
    figures = validate(Flow((4,), FlowConfig(blocks=1, hidden=4)), split(drawn, SPLIT), torch.device("cpu"))
    assert {name for name in figures if name.startswith("auroc")} == {
        *("auroc_seen", "auroc_tone", "auroc_pairs", "auroc_low_pass")
    }
    assert figures["auroc_seen"] == pytest.approx((figures["auroc_tone"] + figures["auroc_pairs"]) / 2)
    assert figures["selection"] == figures["auroc_low_pass"]


def test_the_recall_of_held_out_proxies_is_that_at_the_threshold_of_the_calibration() -> None:
    count = 20
    data = split(features(), SPLIT)
    embedding = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
    held_out = Features(
        **{name: np.repeat(values, count, axis=0) for name, values in vars(data.held_out).items()}
        | {"embedding": embedding}
    )
    flow = Flow((4,), FlowConfig(blocks=1, hidden=4))
    flow.fit_standardizer(torch.from_numpy(embedding))  # without it all rows have the same length and likelihood
    recalls = []
    # Each proxy in turn is the whole calibration, so its score is the threshold. The recall takes each value from none
    # to all others. Scores of a row alone and in a batch round differently, so a row may lie beyond its own threshold.
    for at in range(count):
        changed = dataclasses.replace(data, held_out=held_out, calibration=held_out.where(np.arange(count) == at))
        recalls.append(validate(flow, changed, torch.device("cpu"))["tpr_5"])
    assert sorted(recalls) == pytest.approx([beyond / count for beyond in range(count)], abs=1.01 / count)


def test_a_candidate_without_a_family_trains_on_no_pair_that_involves_it() -> None:
    data = split(features(), SPLIT.model_copy(update={"held_out_family": None}))
    assert sorted(_without_families(data, ("tone",)).proxy.family) == ["low_pass"]
    assert sorted(_without_families(data, ("resample",)).proxy.family) == ["low_pass", "tone", "tone+low_pass"]


def test_the_separation_of_sources_is_the_mean_over_pairs_of_the_better_side_of_their_auroc() -> None:
    low, high, both = np.arange(10.0), np.arange(20.0, 30.0), np.r_[np.arange(5.0) - 9.0, np.arange(5.0) + 90.0]
    score, group = np.r_[low, high, both, 1e9], np.repeat(["low", "high", "both", "too few"], [10, 10, 10, 1])
    assert source_separation(score, group) == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert source_separation(-score, group) == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert source_separation(score[:20], group[:20]) == 1.0


def test_fewer_than_two_sources_of_ten_images_have_no_separation() -> None:
    group = np.repeat(["many", "few"], [30, 9])
    assert source_separation(np.arange(39.0), group) is None


def test_the_separation_of_sources_uses_the_largest_sources() -> None:
    group = np.concatenate([np.repeat(f"{number:02}", 20 if number < 32 else 12) for number in range(40)])
    score = np.where(group < "32", 0.0, np.arange(len(group)))
    assert source_separation(score, group) == 0.5
