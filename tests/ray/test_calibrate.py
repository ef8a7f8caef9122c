"""A checkpoint is calibrated on one's own photographs: on a real cluster, with the tiny checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipflow_ray.audit.rescore import rescore
from clipflow_ray.audit.run import audit, judge_again
from clipflow_ray.calibrate import CalibrationReport, calibrate, in_words
from clipflow_ray.config import AuditConfig, CalibrateConfig, RescoreConfig
from clipflow_ray.errors import CalibrationError, InputError, RunConflictError
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from tests.conftest import encoded, photo

SOURCES = ("album", "phone", "scanner")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of ten photographs each, one file twice, and one broken file."""
    root = tmp_path_factory.mktemp("own")
    for number, source in enumerate(SOURCES):
        (root / source).mkdir()
        for at in range(10):
            data = encoded(photo(1000 + 20 * number + at, (230 + 30 * number, 260)), quality=60 + 15 * number)
            (root / source / f"{at}.jpg").write_bytes(data)
    (root / "album/again.jpg").write_bytes((root / "album/0.jpg").read_bytes())
    (root / "phone/broken.jpg").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def first(trained: str, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationReport:
    output = str(tmp_path_factory.mktemp("calibrated"))
    return calibrate(CalibrateConfig(input=(str(photographs),), output=output, checkpoint=trained))


def test_the_new_checkpoint_gives_the_same_scores_and_p_values_of_the_photographs(
    first: CalibrationReport, trained: str, photographs: Path
) -> None:
    assert (first.photographs, first.sources, first.unreadable, first.repeated) == (30, 3, 1, 1)
    old, new = (Detector.from_checkpoint(path, precision="float32") for path in (trained, first.checkpoint))
    assert new.checkpoint.model_id == old.checkpoint.model_id == first.model_id
    assert (old.calibration.calibration_id, new.calibration.calibration_id) == (
        first.calibration_before,
        first.calibration_after,
    )
    files = [path.read_bytes() for path in sorted(photographs.glob("*/[0-9].jpg"))]
    before, after = old.detect(files, 0.5), new.detect(files, 0.5)
    assert [each.score for each in before] == [each.score for each in after]
    scores = np.array([each.score for each in after])
    # All sources have ten photographs, so the p-value is the plain conformal one.
    expected = [(1 + np.sum(scores >= score)) / (len(scores) + 1) for score in scores]
    assert [each.p_value for each in after] == pytest.approx(expected)


def test_each_precision_has_a_calibration_of_the_same_photographs_and_an_audit_keeps_its_own(
    first: CalibrationReport, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first.precisions == ("float32", "bfloat16")
    half = Detector.from_checkpoint(first.checkpoint, precision="bfloat16")
    assert half.calibration.source_count == 3 and half.calibration.calibration_id != first.calibration_after
    config = AuditConfig(
        input=(str(photographs),),
        output=str(tmp_path / "audit"),
        checkpoint=first.checkpoint,
        precision="bfloat16",
        alpha=0.5,
        keep_embeddings=True,
        gallery=0,
    )
    record = audit(config)
    assert (record.identity.precision, record.identity.encoder_fingerprint, record.identity.calibration_id) == (
        "bfloat16",
        half.encoder.fingerprint,
        half.calibration.calibration_id,
    )
    ledger = pq.read_table(record.ledger).sort_by("row_id").to_pylist()
    assert {row["precision"] for row in ledger} == {"bfloat16"}
    findings = half.detect([Path(row["uri"]).read_bytes() for row in ledger], 0.5)
    for row, finding in zip(ledger, findings, strict=True):
        assert row["verdict"] == finding.verdict
        if finding.status == "ok":
            assert row["score"] == pytest.approx(finding.score, rel=1e-4, abs=1e-4)
            assert row["p_value"] == pytest.approx(finding.p_value)
    scores = {row["sha256"]: row["score"] for row in ledger if row["status"] == "ok"}
    np.testing.assert_allclose(np.sort(list(scores.values())), half.calibration.scores, rtol=1e-4, atol=1e-4)

    # A driver without AMX continues and judges again in the precision that the audit began with.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    (tmp_path / "audit/_SUCCESS").unlink()
    again = audit(config.model_copy(update={"precision": "auto"}))
    assert again.identity == record.identity and again.timing.objects == 0
    assert judge_again(AuditConfig(output=config.output, alpha=0.25)).identity == record.identity
    with pytest.raises(RunConflictError, match="other calibration_id, encoder_fingerprint, precision"):
        audit(config.model_copy(update={"precision": "float32"}))
    rescored = rescore(RescoreConfig(audit=config.output, checkpoint=first.checkpoint))
    assert rescored.identity.calibration_id == half.calibration.calibration_id
    assert rescored.identity.precision == "bfloat16"

    # The audit has scores of one precision, so the checkpoint that is calibrated on it serves in that one.
    own = calibrate(CalibrateConfig(input=(config.output,), output=str(tmp_path / "own"), checkpoint=first.checkpoint))
    assert own.precisions == ("bfloat16",) and own.calibration_after == half.calibration.calibration_id
    assert Detector.from_checkpoint(own.checkpoint).checkpoint.encoder.precision == "bfloat16"
    assert own.model_id == first.model_id == load_checkpoint(own.checkpoint).model_id


def test_the_record_says_how_the_calibration_was_made_and_a_second_one_adds_to_it(
    first: CalibrationReport, photographs: Path, tmp_path: Path
) -> None:
    config = CalibrateConfig(
        input=(str(photographs / "album"), str(photographs / "phone")),
        output=str(tmp_path / "again"),
        checkpoint=first.checkpoint,
        keep_shipped=0.25,
    )
    second = calibrate(config)
    steps = load_checkpoint(second.checkpoint).lineage
    assert [(step.calibration_before, step.photographs, step.keep_shipped) for step in steps] == [
        (first.calibration_before, 30, 0.0),
        (first.calibration_after, 20, 0.25),
    ]
    assert steps[0].input == (photographs.name,) and str(photographs) not in json.dumps(steps[0].model_dump())
    calibration = load_checkpoint(second.checkpoint).calibration
    assert calibration is not None and calibration.weights is not None
    weights = np.sort(calibration.weights)
    assert len(calibration.scores) == 50
    assert weights[:3].tolist() == pytest.approx([0.25 / 3] * 3) and weights[3:].sum() == pytest.approx(0.75)


def test_a_finished_audit_of_the_photographs_gives_the_same_calibration_and_reads_no_image(
    first: CalibrationReport, trained: str, photographs: Path, tmp_path: Path
) -> None:
    run = AuditConfig(input=(str(photographs),), output=str(tmp_path / "audit"), checkpoint=trained, alpha=0.5)
    audit(run)
    config = CalibrateConfig(input=(run.output,), output=str(tmp_path / "calibrated"), checkpoint=trained)
    again = calibrate(config)
    assert again.calibration_after == first.calibration_after
    assert not (tmp_path / "calibrated/scores").exists()
    other = CalibrateConfig(input=(run.output,), output=str(tmp_path / "other"))
    with pytest.raises(InputError, match=f"an audit by model {first.model_id}, not by"):
        calibrate(other)


def test_the_flagged_shares_are_cross_fitted(first: CalibrationReport, trained: str, photographs: Path) -> None:
    """By hand: each of the thirty photographs is judged by a calibration on the others."""
    scores = pq.read_table(Path(first.checkpoint).parent / "scores/scored").sort_by("row_id").to_pylist()
    own = [row for row in scores if row["status"] == "ok"]
    own = [row for at, row in enumerate(own) if row["sha256"] not in {other["sha256"] for other in own[:at]}]
    values = np.array([row["score"] for row in own], np.float32)
    p_values = np.empty(len(own), np.float32)
    for number in range(len(own)):
        others = np.arange(len(own)) != number
        kept = [row for row, is_kept in zip(own, others, strict=True) if is_kept]
        calibration = Calibration.fit(values[others], [row["stratum"] for row in kept], [row["group"] for row in kept])
        p_values[number] = calibration.p_value(values[[number]])[0]
    assert [change.alpha for change in first.alphas] == [0.05]
    for change in first.alphas:
        assert change.after.count == np.sum(p_values <= change.alpha * (1 + 1e-6))
        assert sum(each.after.count for each in change.sources) == change.after.count
        assert {each.name for each in change.sources} == set(SOURCES)


def test_too_few_photographs_are_refused_before_any_is_read(trained: str, photographs: Path, tmp_path: Path) -> None:
    config = CalibrateConfig(input=(str(photographs / "album"),), output=str(tmp_path / "out"), checkpoint=trained)
    with pytest.raises(CalibrationError, match="has 11 objects; a calibration needs at least 20 photographs"):
        calibrate(config)
    assert not (tmp_path / "out").exists()


def test_runs_that_are_no_finished_audit_and_an_output_inside_the_input_are_refused(
    first: CalibrationReport, trained: str, photographs: Path, tmp_path: Path
) -> None:
    scores = str(Path(first.checkpoint).parent / "scores")
    wrong = {
        "Give one finished audit as the only input": CalibrateConfig(
            input=(scores, str(photographs)), output=str(tmp_path / "out"), checkpoint=trained
        ),
        "lies inside the input": CalibrateConfig(
            input=(str(photographs),), output=str(photographs / "out"), checkpoint=trained
        ),
        "The input has changed since": CalibrateConfig(
            input=(str(photographs),), output=str(Path(first.checkpoint).parent), checkpoint=trained
        ),
    }
    extra = photographs / "phone/new.jpg"
    extra.write_bytes(encoded(photo(2000)))
    try:
        for said, config in wrong.items():
            with pytest.raises(InputError, match=said):
                calibrate(config)
    finally:
        extra.unlink()


def test_the_command_prints_what_changes_and_the_page_shows_it(
    first: CalibrationReport, trained: str, photographs: Path, tmp_path: Path
) -> None:
    output = Path(first.checkpoint).parent
    command = [sys.executable, "-m", "clipflow_ray", "calibrate", "--input", str(output / "scores")]
    command += ["--output", str(tmp_path / "out"), "--checkpoint", trained]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    said = "calibrated on 30 photographs; sources: 3; left out: 1 without a score, 1 repeated; precisions: float32"
    assert shown[0] == said
    assert shown[-2] == f"checkpoint: {tmp_path}/out/checkpoint"
    assert [line for line in in_words(first) if line.startswith("alpha")] == [
        line for line in shown if line.startswith("alpha")
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert all(source in page for source in SOURCES) and first.calibration_after in page
