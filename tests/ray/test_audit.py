"""Audits end to end on a real cluster and a real S3 protocol, with the test tower."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from clipflow_ray.audit.record import AuditRecord
from clipflow_ray.audit.run import audit
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.config import AuditConfig
from clipflow_ray.data.scoring import Score
from clipflow_ray.errors import CalibrationError, CheckpointError, InputError, RunConflictError
from clipflow_ray.inputs.format import Row
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.place import Place
from tests.conftest import encoded, photo, s3_client

BROKEN = {"truncated.jpg": "truncated", "empty.png": "empty", "note.jpg": "unsupported_format", "tiny.png": "too_small"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty good images in three groups and formats, with awkward names, and four broken ones."""
    root = tmp_path_factory.mktemp("mixed")
    for at in range(40):
        kind = ("JPEG", "PNG", "WEBP")[at % 3]
        folder = root / ("alpha", "beta set", "gämmä")[at % 3]
        folder.mkdir(exist_ok=True)
        name = f"img {at}+%2F'{at}.{kind.lower()}"
        (folder / name).write_bytes(encoded(photo(1000 + at, (230 + at, 300)), kind))
    good = encoded(photo(2000))
    broken = root / "broken"
    broken.mkdir()
    (broken / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (broken / "empty.png").write_bytes(b"")
    (broken / "note.jpg").write_bytes(b"just a note")
    (broken / "tiny.png").write_bytes(encoded(photo(1, (8, 8)), "PNG"))
    return root


@pytest.fixture(scope="module")
def config(trained: str, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> AuditConfig:
    output = tmp_path_factory.mktemp("audit") / "run"
    return AuditConfig(input=(str(mixed),), output=str(output), checkpoint=trained, alpha=0.1, rows_per_task=8)


@pytest.fixture(scope="module")
def record(cluster: None, config: AuditConfig) -> AuditRecord:
    return audit(config)


def ledger(output: str) -> list[Row]:
    rows: list[Row] = pq.read_table(f"{output}/ledger").to_pylist()
    return rows


def test_every_object_gives_one_row_and_a_broken_one_gives_an_error_row(
    record: AuditRecord, config: AuditConfig, mixed: Path
) -> None:
    rows = ledger(config.output)
    listed = sorted(str(path) for path in mixed.rglob("*") if path.is_file())
    assert sorted(row["uri"] for row in rows) == listed
    assert len({row["row_id"] for row in rows}) == len(rows) == 44
    broken = {Path(row["uri"]).name: row for row in rows if row["status"] == "error"}
    assert {name: row["error_code"] for name, row in broken.items()} == BROKEN
    assert all(row["score"] is None and row["verdict"] is None and row["error_message"] for row in broken.values())
    assert record.by_status == {"error": 4, "ok": 40}
    assert record.by_error_code == dict(sorted(Counter(BROKEN.values()).items()))


def test_the_ledger_has_the_columns_of_the_contract_with_their_types(record: AuditRecord, config: AuditConfig) -> None:
    assert pq.read_table(f"{config.output}/ledger").schema.remove_metadata().equals(LEDGER_SCHEMA)


def test_an_audit_gives_the_scores_of_the_detector_for_the_same_bytes(
    record: AuditRecord, config: AuditConfig, trained: str
) -> None:
    detector = Detector.from_checkpoint(trained)
    for row in ledger(config.output):
        finding = detector.detect(Path(row["uri"]).read_bytes(), config.alpha)
        assert finding.sha256 == row["sha256"]
        if row["status"] == "error":
            assert finding.error is not None and finding.error["code"] == row["error_code"]
        else:
            assert abs(finding.score - row["score"]) <= 1e-4 * max(1.0, abs(row["score"]))
            assert (finding.width, finding.height, finding.format) == (row["width"], row["height"], row["format"])
            assert finding.stratum == row["stratum"]
            assert ("stratum_prone" in finding.reasons) == ("stratum_prone" in row["verdict_reasons"])


def test_verdicts_rates_and_q_values_follow_from_the_stored_p_values(
    record: AuditRecord, config: AuditConfig, trained: str
) -> None:
    rows = [row for row in ledger(config.output) if row["status"] == "ok"]
    p = np.array([row["p_value"] for row in rows])
    calibration = load_checkpoint(trained).calibration
    assert calibration is not None
    rule = calibration.rule(config.alpha, config.cap_prone_strata)
    said = [(row["verdict"], row["verdict_reasons"]) for row in rows]
    assert said == [rule.verdict(row["p_value"], row["stratum"]) for row in rows]
    assert record.capped == sum({"below_alpha", "stratum_prone"} <= set(row["verdict_reasons"]) for row in rows)
    order = np.argsort(p)
    ranked = p[order] * len(p) / np.arange(1, len(p) + 1)
    expected = np.minimum.accumulate(ranked[::-1])[::-1]
    np.testing.assert_allclose(np.array([row["q_value"] for row in rows])[order], np.minimum(expected, 1), rtol=1e-5)
    flagged = sum(row["verdict"] == "likely_ai" for row in rows)
    assert record.flagged.count == flagged and record.flagged.of == len(rows)
    assert record.flagged.wilson_95 is not None
    low, high = record.flagged.wilson_95
    assert low <= flagged / len(rows) <= high


def test_groups_are_the_folders_below_the_input(record: AuditRecord, config: AuditConfig) -> None:
    groups = Counter(row["group"] for row in ledger(config.output))
    assert groups == {"alpha": 14, "beta set": 13, "gämmä": 13, "broken": 4}


def test_a_finished_audit_is_returned_without_work_and_another_alpha_only_changes_verdicts(
    record: AuditRecord, config: AuditConfig
) -> None:
    scored = {path: path.stat().st_mtime_ns for path in Path(config.output, "scored").iterdir()}
    again = audit(config)
    assert again == AuditRecord.model_validate_json(Path(config.output, "run.json").read_text())
    wider = audit(config.model_copy(update={"alpha": 0.5}))
    assert wider.flagged.count >= record.flagged.count
    assert scored == {path: path.stat().st_mtime_ns for path in Path(config.output, "scored").iterdir()}
    assert len(ledger(config.output)) == 44
    audit(config)


def test_another_checkpoint_or_input_on_the_same_output_is_refused_and_named(
    record: AuditRecord, config: AuditConfig, mixed: Path
) -> None:
    with pytest.raises(RunConflictError, match="input"):
        audit(config.model_copy(update={"input": (str(mixed / "alpha"),)}))
    with pytest.raises(RunConflictError, match="limits"):
        audit(config.model_copy(update={"limits": config.limits.model_copy(update={"min_side": 16})}))


def test_an_alpha_below_what_the_calibration_supports_is_refused_before_anything_is_written(
    cluster: None, config: AuditConfig, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="calibration images"):
        audit(config.model_copy(update={"alpha": 0.001, "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_and_an_empty_input_are_refused_with_a_sentence(
    cluster: None, config: AuditConfig, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint"):
        audit(config.model_copy(update={"checkpoint": str(tmp_path)}))
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="no objects"):
        audit(config.model_copy(update={"input": (str(tmp_path / "in"),), "output": str(tmp_path / "run")}))


def test_an_s3_prefix_gives_the_same_scores_as_the_folder_it_was_copied_from(
    record: AuditRecord, config: AuditConfig, mixed: Path, s3: Place
) -> None:
    client = s3_client(s3)
    client.create_bucket(Bucket="audits")
    for path in mixed.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="audits", Key=f"in/{path.relative_to(mixed)}", Body=path.read_bytes())
    result = audit(
        config.model_copy(update={"input": ("s3://audits/in/",), "output": "s3://audits/out", "s3": s3.options})
    )
    assert result.by_status == record.by_status
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="audits", Prefix="out/")["Contents"]]
    assert {"out/_SUCCESS", "out/run.json"} <= set(keys)
    stored = s3.with_uri("s3://audits/out/ledger").arguments("source", "filesystem")
    remote = {row["sha256"]: row["score"] for row in pq.read_table(**stored).to_pylist()}
    for row in ledger(config.output):
        if row["score"] is not None:
            assert abs(remote[row["sha256"]] - row["score"]) <= 1e-4
    assert "SECRET" not in result.model_dump_json().upper()


class Neighbour:
    """An actor that occupies its CPUs and does nothing."""


def test_scores_are_written_while_later_images_are_still_read(
    cluster: None, config: AuditConfig, tmp_path: Path
) -> None:
    images = tmp_path / "in"
    images.mkdir()
    # Images that are slow to decode: reading continues long after the encoder has started.
    (images / "0000.jpg").write_bytes(encoded(photo(0, (1500, 2000)), quality=98, progressive=True))
    for at in range(1, 160):
        os.link(images / "0000.jpg", images / f"{at:04d}.jpg")
    output = tmp_path / "run"
    neighbours: list[Any] = []

    def crowd() -> None:
        """As soon as a file is written, take 1.5 CPUs: half a CPU, for one reader, is left besides the encoder's."""
        while not list(output.glob("scored/*.parquet")) and not (output / "_SUCCESS").exists():
            time.sleep(0.05)
        neighbours.append(ray.remote(num_cpus=1.5)(Neighbour).remote())

    crowding = threading.Thread(target=crowd)
    crowding.start()
    sizes = {"rows_per_task": 8, "batch_size": 8}
    audit(config.model_copy(update={"input": (str(images),), "output": str(output), **sizes}))
    crowding.join()
    ray.kill(neighbours[0])
    files = list((output / "scored").glob("*.parquet"))
    scored = [max(pq.read_table(file, columns=["scored_at"])["scored_at"].to_pylist()) for file in files]
    last = max(datetime.fromisoformat(at).timestamp() for at in scored)
    written = sorted(file.stat().st_mtime for file in files)
    assert len(written) >= 15
    assert written[len(written) // 2] < last, [round(at - last, 1) for at in written]


def test_an_audit_whose_driver_was_killed_resumes_without_loss_or_duplicate(
    record: AuditRecord, config: AuditConfig, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    settings = config.model_copy(
        update={"output": str(output), "rows_per_task": 2, "batch_size": 2, "keep_embeddings": True}
    )
    file = tmp_path / "audit.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "clipflow_ray", "audit", "--config", str(file)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def committed() -> list[Path]:
        return [path for path in (output / "resume" / "scored").glob("*.parquet") if ".pending." not in path.name]

    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and driver.poll() is None and len(committed()) < 3:
        time.sleep(0.02)
    assert driver.poll() is None, "the audit ended before it could be killed"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    done = sum(pq.read_metadata(path).num_rows for path in committed())
    assert 0 < done < 44
    assert not (output / "_SUCCESS").exists()
    (output / "embeddings/torn.parquet").write_bytes(b"PAR1")  # as a killed worker may leave one
    result = audit(settings)
    rows = ledger(str(output))
    reference = {row["row_id"]: row for row in ledger(config.output)}
    assert Counter(row["row_id"] for row in rows) == Counter(list(reference))
    assert {row["row_id"]: row["error_code"] for row in rows} == {k: r["error_code"] for k, r in reference.items()}
    for row in rows:
        if row["score"] is not None:
            assert abs(row["score"] - reference[row["row_id"]]["score"]) <= 1e-4
    assert 0 < result.timing.objects <= 44 - done  # a worker may have outlived the driver by a block
    assert {path.name for path in (output / "embeddings").iterdir()} == {
        path.name for path in (output / "scored").iterdir()
    }
    kept = pq.read_table(output / "embeddings").to_pylist()
    assert {row["row_id"]: row["projected@224"] is not None for row in kept} == {
        row["row_id"]: row["score"] is not None for row in rows
    }


def test_the_scoring_actors_metrics_are_on_rays_prometheus_endpoint(cluster: None, trained: str) -> None:
    view = np.zeros((224, 224, 3), np.uint8).tobytes()
    table = pa.table(
        {
            "view": pa.array([view, view, None], pa.large_binary()),
            "stratum": pa.array(["jpeg|0-256"] * 2 + [None], pa.string()),
            "status": ["ok", "ok", "error"],
            "error_code": pa.array([None, None, "truncated"], pa.string()),
            "error_message": pa.nulls(3, pa.string()),
        }
    )
    actor: Any = ray.remote(num_cpus=0)(Score).remote(load_checkpoint(trained), False, 1)
    ray.get(actor.__call__.remote(table))
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    expected = [
        r'ray_clipflow_images_total{.*error_code="",.*status="ok".*} 2\.0',
        r'ray_clipflow_images_total{.*error_code="truncated",.*status="error".*} 1\.0',
        r"ray_clipflow_encode_seconds_count{.*} 1\.0",
    ]
    deadline = time.monotonic() + 60  # Ray collects metrics every ten seconds
    while not all(re.search(line, text := httpx.get(url).text) for line in expected):
        assert time.monotonic() < deadline, [line for line in text.splitlines() if "clipflow" in line]
        time.sleep(0.5)
    ray.kill(actor)
