"""A finished audit is judged by another checkpoint, from its kept embeddings."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipflow_ray.audit.record import AuditRecord
from clipflow_ray.audit.rescore import rescore
from clipflow_ray.audit.run import audit, judge_again
from clipflow_ray.calibrate import calibrate
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.config import AuditConfig, CalibrateConfig, RescoreConfig
from clipflow_ray.errors import EncoderMismatchError, InputError, RunConflictError
from clipflow_ray.inputs.format import Row
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import load_checkpoint, save_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.place import Place
from tests.conftest import encoded, photo

COLUMN = "projected@224"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The audited files by their paths; the audit ends with no file left."""
    root = tmp_path_factory.mktemp("images")
    files = {str(root / f"{at}.jpg"): encoded(photo(7000 + at, (230, 250))) for at in range(39)}
    return files | {str(root / "broken.jpg"): b"\xff\xd8\xff nothing"}


@pytest.fixture(scope="module")
def record(trained: str, images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> AuditRecord:
    root = Path(next(iter(images))).parent
    for name, data in images.items():
        Path(name).write_bytes(data)
    output = str(tmp_path_factory.mktemp("audit") / "run")
    config = AuditConfig(
        input=(str(root),), output=output, checkpoint=trained, alpha=0.2, rows_per_task=8, keep_embeddings=True
    )
    done = audit(config)
    shutil.rmtree(root)
    return done


@pytest.fixture(scope="module")
def other(trained: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the same encoder with another flow and another calibration."""
    checkpoint = load_checkpoint(trained)
    assert checkpoint.calibration is not None
    state = {name: value + 0.5 if name.endswith("offset") else value for name, value in checkpoint.flow_state.items()}
    calibration = Calibration.fit(
        checkpoint.calibration.scores + np.float32(0.1),
        checkpoint.calibration.strata,
        checkpoint.calibration.sources.tolist(),
    )
    place = Place.at(tmp_path_factory.mktemp("other") / "checkpoint")
    save_checkpoint(replace(checkpoint, flow_state=state, calibration=calibration), place)
    return place.uri


@pytest.fixture(scope="module")
def rescored(record: AuditRecord, other: str) -> AuditRecord:
    return rescore(RescoreConfig(audit=record.config.output, checkpoint=other))


def rows(folder: str | Path) -> list[Row]:
    found: list[Row] = pq.read_table(folder).sort_by("row_id").to_pylist()
    return found


def test_an_audit_keeps_the_embeddings_of_each_image_in_files_beside_its_scores(
    record: AuditRecord, trained: str, images: dict[str, bytes]
) -> None:
    output = Path(record.config.output)
    assert sorted(path.name for path in (output / "embeddings").iterdir()) == sorted(
        path.name for path in (output / "scored").iterdir()
    )
    assert pq.read_schema(next((output / "ledger").iterdir())).remove_metadata().equals(LEDGER_SCHEMA)
    detector = Detector.from_checkpoint(trained)
    ledger = rows(output / "ledger")
    kept = rows(output / "embeddings")
    assert [row["row_id"] for row in kept] == [row["row_id"] for row in ledger]
    assert set(kept[0]) == {"row_id", COLUMN}
    embedded = detector.embed([images[row["uri"]] for row in ledger])
    assert len(embedded.errors) == 1
    for at, (row, judged) in enumerate(zip(kept, ledger, strict=True)):
        if judged["status"] == "error":
            assert row[COLUMN] is None and embedded.errors[at].item_code == judged["error_code"]
        else:
            np.testing.assert_allclose(np.array(row[COLUMN], np.float32), embedded.values[at], rtol=1e-3, atol=1e-4)


def test_another_checkpoint_judges_the_images_of_an_audit_that_are_gone(
    record: AuditRecord, rescored: AuditRecord, other: str, images: dict[str, bytes]
) -> None:
    before, after = rows(record.ledger), rows(rescored.ledger)
    judged_by = {"score", "log_likelihood", "log_base", "log_det", "p_value", "p_stratum", "q_value", "scored_at"}
    judged_by |= {"verdict", "verdict_reasons", "model_id", "calibration_id"}
    for old, new in zip(before, after, strict=True):
        assert {name: old[name] for name in old if name not in judged_by} == {
            name: new[name] for name in new if name not in judged_by
        }
    detector = Detector.from_checkpoint(other)
    findings = detector.detect([images[row["uri"]] for row in after], record.alpha)
    for row, old, finding in zip(after, before, findings, strict=True):
        assert (row["status"], row["model_id"]) == (finding.status, detector.checkpoint.model_id)
        if row["status"] == "ok":
            assert row["score"] == pytest.approx(finding.score, rel=1e-2, abs=2e-2)
            assert abs(row["score"] - old["score"]) > 0.05
    assert rescored.identity.rescored_from == record.config.output
    assert rescored.by_status == record.by_status == {"error": 1, "ok": 39}
    assert Path(rescored.config.output).is_relative_to(record.config.output)


def test_the_command_of_the_report_repeats_it_and_finalize_changes_its_verdicts(
    record: AuditRecord, other: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "again")
    first = rescore(RescoreConfig(audit=record.config.output, checkpoint=other, output=output, alpha=0.5))
    command = json.loads(Path(output, "report.json").read_text())["command"]
    program, *arguments = shlex.split(command)
    assert program == "clipflow-ray" and arguments[:2] == ["rescore", record.config.output]
    printed = subprocess.run(
        [sys.executable, "-m", "clipflow_ray", *arguments, "--json"], capture_output=True, text=True, check=True
    )
    assert AuditRecord.model_validate_json(printed.stdout) == first
    again = judge_again(AuditConfig(output=output, alpha=0.1))
    assert again.identity == first.identity and again.alpha == 0.1
    assert again.flagged.count <= first.flagged.count


def test_an_interrupted_rescoring_writes_only_what_is_missing(
    record: AuditRecord, rescored: AuditRecord, other: str, tmp_path: Path
) -> None:
    output = tmp_path / "part"
    shutil.copytree(rescored.config.output, output)
    shutil.rmtree(output / "ledger")
    (output / "_SUCCESS").unlink()
    first, *others = sorted((output / "scored").iterdir())
    first.unlink()
    written = {path: path.stat().st_mtime_ns for path in others}
    again = rescore(RescoreConfig(audit=record.config.output, checkpoint=other, output=str(output)))
    assert {path: path.stat().st_mtime_ns for path in others} == written
    scores = [[row["score"] for row in rows(folder)] for folder in (again.ledger, rescored.ledger)]
    assert scores[0] == scores[1]


def test_embeddings_that_do_not_fit_the_checkpoint_are_refused(
    record: AuditRecord, rescored: AuditRecord, other: str, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], match: str, run: str, checkpoint: str = other) -> None:
        with pytest.raises(kind, match=match):
            rescore(RescoreConfig(audit=run, checkpoint=checkpoint, output=str(tmp_path / "out")))

    refused(InputError, "holds no finished audit", str(tmp_path))
    refused(InputError, "keeps no embeddings", rescored.config.output)
    mismatched = tmp_path / "encoder"
    save_checkpoint(replace(load_checkpoint(other), encoder_fingerprint="0" * 16), Place.at(mismatched))
    refused(EncoderMismatchError, "Audit the images again", record.config.output, str(mismatched))
    run = tmp_path / "run"
    shutil.copytree(record.config.output, run)
    next((run / "embeddings").iterdir()).unlink()
    refused(InputError, "were deleted", str(run))
    assert not (tmp_path / "out").exists()


def test_an_output_with_other_scores_is_not_overwritten(record: AuditRecord, other: str) -> None:
    with pytest.raises(RunConflictError, match="holds a run with other"):
        rescore(RescoreConfig(audit=record.config.output, checkpoint=other, output=record.config.output))


def test_a_checkpoint_is_calibrated_on_the_embeddings_of_an_audit_by_another(
    record: AuditRecord, rescored: AuditRecord, other: str, tmp_path: Path
) -> None:
    config = CalibrateConfig(input=(record.config.output,), output=str(tmp_path / "calibrated"), checkpoint=other)
    report = calibrate(config)
    calibration = load_checkpoint(report.checkpoint).calibration
    assert calibration is not None and report.photographs == 39
    scores = sorted(row["score"] for row in rows(rescored.ledger) if row["status"] == "ok")
    assert calibration.scores.tolist() == scores
