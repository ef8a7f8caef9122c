"""The generated sections of docs/formats.md against the code."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, Field

from clipflow_ray.columns import STATUSES, Status
from clipflow_ray.errors import ITEM_CODES, ItemCode
from clipflow_ray.lab.formats import DOCUMENT, SECTIONS, model_tables, rendered
from clipflow_ray.model.calibration import REASONS, VERDICTS, Reason, Verdict
from clipflow_ray.model.finding import WARNINGS, WarningCode
from clipflow_ray.serve.failures import CODES
from clipflow_ray.serve.schemas import ErrorCode

TEXT = (Path(__file__).parents[2] / DOCUMENT).read_text(encoding="utf-8")


def test_the_document_is_what_the_code_gives() -> None:
    assert rendered(TEXT) == TEXT, "run `make docs`"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_in_the_document_once(name: str) -> None:
    assert TEXT.count(f"<!-- generated: {name} -->\n") == 1


def test_an_outdated_section_is_replaced_and_the_rest_is_kept() -> None:
    text = "before\n<!-- generated: statuses -->\nold\n<!-- end -->\nafter\n"
    assert rendered(text).startswith("before\n<!-- generated: statuses -->\n\n| status | meaning |\n")
    assert rendered(text).endswith("|\n\n<!-- end -->\nafter\n") and "old" not in rendered(text)


@pytest.mark.parametrize(
    ("meanings", "codes"),
    [
        (ITEM_CODES, ItemCode),
        (STATUSES, Status),
        (VERDICTS, Verdict),
        (REASONS, Reason),
        (WARNINGS, WarningCode),
        (CODES, ErrorCode),
    ],
)
def test_every_code_has_a_sentence(meanings: dict[str, object], codes: object) -> None:
    assert set(meanings) == set(get_args(codes))


class Inner(BaseModel):
    """The inner one."""

    pair: tuple[float, int] = Field(description="Two numbers.")


class Outer(BaseModel):
    """The outer one."""

    names: list[str] = Field(description="Names | aliases.")
    inner: Inner | None = Field(None, description="Its part.")
    counts: dict[str, int] = Field(description="Counts.")


def test_a_model_becomes_a_table_of_its_fields_and_one_of_each_nested_model() -> None:
    assert model_tables(Outer) == (
        "**Outer.** The outer one.\n\n"
        "| field | type | meaning |\n| --- | --- | --- |\n"
        "| `names` | list of string | Names \\| aliases. |\n"
        "| `inner` | Inner or null | Its part. |\n"
        "| `counts` | object of integer | Counts. |\n\n"
        "**Inner.** The inner one.\n\n"
        "| field | type | meaning |\n| --- | --- | --- |\n"
        "| `pair` | [number, integer] | Two numbers. |\n"
    )
