"""Which images train, choose the epoch and calibrate."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray.config import SplitConfig
from clipflow_ray.errors import ConfigError, TrainingError
from clipflow_ray.train.parts import MIN_CALIBRATION, Parts, assigned

NOTHING_NAMED = SplitConfig()


def images(**counts: int) -> list[tuple[str, str]]:
    """Row ids and sources: `counts` images of each source."""
    return [(f"{source}-{at}", source) for source, count in counts.items() for at in range(count)]


def members(parts: Parts, given: list[tuple[str, str]]) -> dict[str, set[tuple[str, str]]]:
    """The images of each part."""
    found = parts.of([row for row, _ in given], [source for _, source in given])
    return {
        name: {image for image, part in zip(given, found, strict=True) if part == name}
        for name in ("training", "validation", "calibration")
    }


def test_the_named_sources_are_kept_out_and_all_others_train() -> None:
    listed = images(lake=30, tower=12, harbour=15, studio=5, meadow=1)
    split = SplitConfig(validation=("tower",), calibration=("studio", "lake"))
    parts = assigned(listed, split, allow_small=False)
    assert parts == Parts(by="source", validation=("tower",), calibration=("lake", "studio"))
    found = {name: {source for _, source in each} for name, each in members(parts, listed).items()}
    assert found == {
        "training": {"harbour", "meadow"},
        "validation": {"tower"},
        "calibration": {"lake", "studio"},
    }


def test_without_names_each_of_two_parts_gets_one_source_in_five_by_its_name_alone() -> None:
    listed = images(**{f"source{at}": 11 for at in range(20)})
    parts = assigned(listed, NOTHING_NAMED, allow_small=False)
    assert (parts.by, len(parts.validation), len(parts.calibration)) == ("source", 4, 4)
    assert assigned(listed[::-1], NOTHING_NAMED, allow_small=False) == parts
    assert assigned(images(**{f"source{at}": 30 for at in range(20)}), NOTHING_NAMED, allow_small=False) == parts


def test_with_fewer_than_seven_sources_images_are_split_and_a_warning_says_what_that_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listed = images(lake=50, tower=50, harbour=50, studio=50)
    with caplog.at_level(logging.WARNING):
        parts = assigned(listed, NOTHING_NAMED, allow_small=False)
    assert parts.by == "image" and "only 4 sources, so images and not sources are split" in caplog.text
    assert {name: len(each) for name, each in members(parts, listed).items()} == {
        "training": 120,
        "validation": 40,
        "calibration": 40,
    }
    caplog.clear()
    assigned(images(a=50, b=50, c=50, d=50, e=50, f=50, g=50), NOTHING_NAMED, allow_small=False)
    assert "images and not sources" not in caplog.text


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (SplitConfig(validation=("atlantis",), calibration=("lake",)), r"Unknown: \['atlantis'\]\. There are: lake, t"),
        (SplitConfig(calibration=("lake", "mu")), r"Unknown: \['mu'\]"),
        (SplitConfig(calibration=("lake",)), "for both `split.validation` and `split.calibration`, or for neither"),
        (SplitConfig(validation=("lake",), calibration=("lake", "tower")), "each once"),
    ],
)
def test_an_unknown_source_and_one_that_is_named_twice_are_refused_by_name(split: SplitConfig, said: str) -> None:
    for allow_small in (True, False):
        with pytest.raises(ConfigError, match=said):
            assigned(images(lake=30, tower=30), split, allow_small)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"lake": MIN_CALIBRATION - 2, "tower": 1}, "19 from 2"),
        ({"lake": 100}, "100 from 1"),
    ],
)
def test_a_calibration_that_is_too_small_is_refused_unless_that_is_allowed(counts: dict[str, int], said: str) -> None:
    listed = images(**counts, harbour=40, meadow=40)
    split = SplitConfig(validation=("harbour",), calibration=tuple(counts))
    with pytest.raises(TrainingError, match=f"it would have {said}.*--allow-small"):
        assigned(listed, split, allow_small=False)
    assert assigned(listed, split, allow_small=True).calibration == tuple(counts)


def test_a_calibration_of_twenty_images_of_two_sources_is_enough() -> None:
    listed = images(lake=MIN_CALIBRATION - 1, tower=1, harbour=40)
    split = SplitConfig(validation=("harbour",), calibration=("lake", "tower"))
    assert assigned(listed, split, allow_small=False).calibration == ("lake", "tower")


def test_what_the_calibration_will_support_is_said_before_the_training_starts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    split = SplitConfig(validation=("harbour",), calibration=("lake", "tower"))
    with caplog.at_level(logging.INFO):
        assigned(images(lake=90, tower=9, harbour=40), split, allow_small=False)
    assert "calibration: 99 images of 2 sources, so the smallest alpha is 0.01" in caplog.text


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), st.sampled_from(["", "a", "b", "c", "d", "e", "é", "a/b", "f"]), max_size=40),
    st.data(),
)
def test_the_parts_are_disjoint_and_share_no_source_if_sources_are_split(
    source_of: dict[str, str], data: st.DataObject
) -> None:
    listed, sources = list(source_of.items()), sorted(set(source_of.values()))
    named = data.draw(st.lists(st.sampled_from(sources), unique=True)) if sources else []
    named = named if len(named) > 1 else []  # a source for each of the two parts, or none for either
    cut = data.draw(st.integers(1, len(named) - 1)) if named else 0
    split = SplitConfig(validation=tuple(named[:cut]), calibration=tuple(named[cut:]))
    parts = assigned(listed, split, allow_small=True)
    found = members(parts, listed)
    assert sum(len(each) for each in found.values()) == len(listed)
    assert set().union(*found.values()) == set(listed)
    assert parts.by == ("source" if named or len(sources) >= 7 else "image")
    if parts.by == "source":
        held = [{source for _, source in each} for each in found.values()]
        assert sum(len(each) for each in held) == len(sources)
    if not named:
        total = len(sources) if parts.by == "source" else len(listed)
        counts = (len(parts.validation), len(parts.calibration))
        assert counts == (-(-total // 5), -(-max(0, total - 1) // 5))


def test_the_part_of_an_image_does_not_depend_on_the_others() -> None:
    parts = Parts(by="source", validation=("a",), calibration=("b",))
    groups = ["b", "a", "c", "bb", ""]
    together = parts.of(["0", "1", "2", "3", "4"], groups)
    assert list(together) == ["calibration", "validation", "training", "training", "training"]
    alone = [parts.of([str(at)], [group])[0] for at, group in enumerate(groups)]
    np.testing.assert_array_equal(together, alone)
    assert len(parts.of([], [])) == 0
