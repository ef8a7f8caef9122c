"""The table of columns against the stages that produce them."""

from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from clipflow_ray.audit.judging import Judge, PValues
from clipflow_ray.audit.ledger import judged
from clipflow_ray.audit.run import check_columns
from clipflow_ray.columns import (
    COLUMNS,
    LEDGER_SCHEMA,
    MANIFEST_SCHEMA,
    Stage,
    add_columns,
    ledger_table,
    manifest_table,
)
from clipflow_ray.config import OPENAI_VIEW, ImageLimits
from clipflow_ray.data.reading import ReadImage, described
from clipflow_ray.data.scoring import scored
from clipflow_ray.errors import ClipflowError, ReadError
from clipflow_ray.images import DecodedImage
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.model.scorer import Scores
from clipflow_ray.place import Place

CALIBRATION = Calibration.fit(np.arange(50, dtype=np.float32), ["jpeg|0-256"] * 50)
CONSTANTS = {"model_id": "a" * 16, "calibration_id": "b" * 16, "precision": "float32", "tool_version": "1.0"}
READING = {"near": Place.at("/"), "limits": ImageLimits(), "spec": OPENAI_VIEW}
RULE = Rule(0.2, frozenset(), cap=True)
STAGES = get_args(Stage)[1:]


def row(name: str) -> dict[str, Any]:
    return dict.fromkeys(MANIFEST_SCHEMA.names) | {
        "row_id": name,
        "uri": f"/in/{name}",
        "member": "",
        "input_format": "images",
    }


def values(stage: Stage) -> dict[str, Any]:
    """One row of nulls for all columns of a stage."""
    return {column.name: [None] for column in COLUMNS if stage in column.stages}


def through_all_stages(rule: Rule = RULE) -> pa.Table:
    """A good image, an image without a finite score, an unreadable one and one outside the sample."""
    pixels = np.zeros((40, 30, 3), np.uint8)
    image = DecodedImage(pixels, 30, 40, "JPEG", "RGB", 1, 90, False)
    outcomes = [
        ReadImage("c" * 64, 1000, image),
        ReadImage("d" * 64, 1001, image),
        ReadImage(None, None, ReadError("not_found", "It is not there.")),
        ReadImage(None, None, None),
    ]
    table = described(manifest_table([row(name) for name in "abcd"]), outcomes, [b"view", b"view", None, None])
    numbers = (np.array([value, np.nan], np.float32) for value in (-1.0, -2.0, 1.0, 45.0, 0.1))
    table = scored(table, np.array([True, True, False, False]), Scores(*numbers), CALIBRATION)
    p_values = PValues()
    p_values.add(np.array([0.1, 0.2], np.float32))
    return judged(table, Judge(rule, p_values), pa.nulls(4, pa.string()), False, CONSTANTS)


def test_the_stages_together_give_the_ledger() -> None:
    table = through_all_stages()
    assert table.schema.equals(LEDGER_SCHEMA)
    good, broken, missing, skipped = table.to_pylist()
    assert (good["status"], good["bytes"], good["verdict"]) == ("ok", 1000, "likely_ai")
    assert good["score"] == 45.0 and good["q_value"] == pytest.approx(0.2)
    assert (broken["status"], broken["error_code"], broken["score"]) == ("error", "non_finite", None)
    assert (missing["status"], missing["error_code"]) == ("error", "not_found")
    assert (skipped["status"], skipped["error_code"], skipped["verdict"]) == ("skipped_sample", None, None)


@pytest.mark.parametrize(("cap", "verdict"), [(True, "inconclusive"), (False, "likely_ai")])
def test_an_image_of_a_prone_stratum_says_so_in_its_row_and_is_flagged_only_without_the_cap(
    cap: bool, verdict: str
) -> None:
    good, *others = through_all_stages(Rule(0.2, frozenset({"jpeg|0-256"}), cap)).to_pylist()
    assert (good["verdict"], good["verdict_reasons"]) == (verdict, ["below_alpha", "stratum_prone"])
    assert all(row["verdict_reasons"] is None for row in others)


def test_every_column_of_the_ledger_gets_a_value_from_its_stage() -> None:
    """Null in all rows here: duplicates, strata with under 100 images, and what only some inputs give."""
    table = through_all_stages()
    empty = {name for name in table.column_names if table[name].null_count == len(table)}
    assert empty == {"dup_of", "p_stratum", "group", "label", "generator"}


def test_an_empty_manifest_passes_through_the_stages_before_an_image_is_read() -> None:
    check_columns(READING, CALIBRATION, CONSTANTS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_a_column_that_is_not_listed_is_refused(stage: Stage) -> None:
    with pytest.raises(ClipflowError, match=f"{stage} stage has the unlisted colour"):
        add_columns(pa.table({"row_id": ["a"]}), stage, values(stage) | {"colour": ["red"]})


@pytest.mark.parametrize("stage", STAGES)
def test_a_listed_column_that_its_stage_does_not_produce_is_refused(stage: Stage) -> None:
    for name in values(stage):
        with pytest.raises(ClipflowError, match=f"{stage} stage lacks {name}\\."):
            add_columns(pa.table({"row_id": ["a"]}), stage, {k: v for k, v in values(stage).items() if k != name})


def test_a_row_of_the_listing_with_other_columns_is_refused() -> None:
    with pytest.raises(ClipflowError, match="unlisted colour"):
        manifest_table([row("a"), row("b") | {"colour": "red"}])
    with pytest.raises(ClipflowError, match="lacks uri"):
        manifest_table([{name: value for name, value in row("a").items() if name != "uri"}])


def test_constants_that_are_not_columns_are_refused_when_the_graph_is_built() -> None:
    with pytest.raises(ClipflowError, match="unlisted colour"):
        check_columns(READING, CALIBRATION, CONSTANTS | {"colour": "red"})
    with pytest.raises(ClipflowError, match="lacks tool_version"):
        check_columns(READING, CALIBRATION, {k: v for k, v in CONSTANTS.items() if k != "tool_version"})


def test_a_ledger_with_a_column_from_outside_the_stages_is_refused() -> None:
    table = through_all_stages()
    with pytest.raises(ClipflowError, match="unlisted colour"):
        ledger_table(table.append_column("colour", pa.array(["red"] * len(table))))
    with pytest.raises(ClipflowError, match="lacks group"):
        ledger_table(table.drop_columns(["group"]))


def test_columns_are_listed_once_and_have_a_sentence() -> None:
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    assert all(column.meaning.endswith(".") and column.stages for column in COLUMNS)
