"""What is said of one image, made from its facts and its numbers."""

import subprocess
import sys
from dataclasses import asdict, fields

import pytest

from clipflow_ray.config import ImageLimits
from clipflow_ray.errors import ItemError
from clipflow_ray.images import decode
from clipflow_ray.model.calibration import Rule
from clipflow_ray.model.finding import FileFacts, Finding, Numbers, judged, refused
from clipflow_ray.serve.schemas import ItemResult
from tests.conftest import encoded, photo

FACTS = FileFacts(width=300, height=200, format="JPEG", mode="RGB", frames=1, jpeg_quality=90, has_exif=True)
RULE = Rule(0.01, frozenset(), cap=True)


def test_the_facts_of_a_decoded_image() -> None:
    image = decode(encoded(photo(1, (200, 300)), quality=90), ImageLimits())
    facts = FileFacts.of(image)
    assert asdict(facts) == {name: value for name, value in vars(image).items() if name != "rgb"}
    assert (facts.width, facts.height, facts.format, facts.jpeg_quality) == (300, 200, "JPEG", 90)
    assert facts.stratum == "jpeg|256-512"


@pytest.mark.parametrize(
    ("p_value", "verdict", "reason"),
    [(0.01, "likely_ai", "below_alpha"), (0.05, "inconclusive", "near_alpha"), (0.06, "no_ai_signal", "above_alpha")],
)
def test_the_finding_of_a_decoded_image(p_value: float, verdict: str, reason: str) -> None:
    assert asdict(judged(3, "ab", FACTS, Numbers(-900.0, 1.5, p_value), RULE, view_size=224)) == {
        "index": 3,
        "sha256": "ab",
        "status": "ok",
        "width": 300,
        "height": 200,
        "format": "JPEG",
        "log_likelihood": -900.0,
        "score": 1.5,
        "p_value": p_value,
        "stratum": "jpeg|256-512",
        "verdict": verdict,
        "reasons": [reason],
        "warnings": ["enlarged_to_view"],
        "error": None,
    }


@pytest.mark.parametrize(("cap", "verdict"), [(True, "inconclusive"), (False, "likely_ai")])
def test_the_finding_of_an_image_of_a_prone_stratum_says_so(cap: bool, verdict: str) -> None:
    rule = Rule(0.01, frozenset({FACTS.stratum}), cap)
    finding = judged(0, "ab", FACTS, Numbers(-900.0, 1.5, 0.002), rule, view_size=224)
    assert (finding.verdict, finding.reasons) == (verdict, ["below_alpha", "stratum_prone"])


def test_an_item_of_an_http_answer_has_every_field_of_a_finding_and_two_of_its_own() -> None:
    assert set(ItemResult.model_fields) == {field.name for field in fields(Finding)} | {"id", "latency_ms"}


def test_the_view_of_a_small_encoder_enlarges_less() -> None:
    assert judged(0, "ab", FACTS, Numbers(-900.0, 1.5, 0.5), RULE, view_size=200).warnings == []


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_without_a_finite_score_there_is_an_error_and_no_verdict(score: float) -> None:
    finding = judged(0, "ab", FACTS, Numbers(score, score, score), RULE, view_size=224)
    assert finding.error is not None and finding.error["code"] == "non_finite"
    assert finding == Finding(0, "ab", "error", error=finding.error)


def test_an_image_that_was_refused_has_the_error_as_a_code_and_a_sentence() -> None:
    finding = refused(1, None, ItemError("too_small", "It is too small."))
    assert (finding.status, finding.error) == ("error", {"code": "too_small", "message": "It is too small."})


def test_neither_torch_nor_ray_is_needed() -> None:
    code = "import sys, clipflow_ray.model.finding; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
