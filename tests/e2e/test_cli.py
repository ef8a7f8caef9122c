"""The command line as a user runs it, with the packaged checkpoint and real CLIP weights."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipflow_ray import __version__, load_detector
from clipflow_ray.demo import objects
from tests.conftest import encoded, photo


def run(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipflow_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in (
        "audit",
        "rescore",
        "finalize",
        "score",
        "serve",
        "train",
        "calibrate",
        "evaluate",
        "proxies",
        "weights",
        "demo",
        "doctor",
    ):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("audit", "--output", "x"), "--input"),
        (("audit", "--input", "x"), "output"),
        (("audit", "--input", "x", "--output", "y", "--alpha", "2"), "alpha"),
        (("score", "x.jpg", "--csv", "--json"), "not both"),
        (("evaluate", "--natural", "x", "--output", "y"), "generated"),
        (("evaluate", "--natural", "x", "--generated", "x", "--output", "y"), "both labels"),
    ],
)
def test_a_usage_error_is_one_sentence_on_stderr_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_failure_is_one_sentence_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    done = run("audit", "--input", str(tmp_path), "--output", str(tmp_path / "o"), "--checkpoint", str(tmp_path / "c"))
    assert done.returncode == 1
    assert "error [invalid_checkpoint]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.real_weights
def test_score_prints_one_json_line_for_each_file_and_an_error_line_for_a_bad_one(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    good.write_bytes(encoded(photo(1)))
    bad.write_bytes(b"text")
    done = run("score", str(good), str(bad), "--json")
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["index"], line["status"]) for line in lines] == [(0, "ok"), (1, "error")]
    assert lines[1]["error"]["code"] == "unsupported_format"
    assert lines[0]["verdict"] in {"likely_ai", "inconclusive", "no_ai_signal"}
    assert "not proof" in done.stderr


@pytest.mark.real_weights
def test_doctor_finds_no_fault() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert f"clipflow-ray {__version__}" in done.stdout and "FAIL" not in done.stdout


@pytest.mark.real_weights
def test_the_demo_audits_photographs_from_s3_and_shows_its_broken_files_as_error_rows(tmp_path: Path) -> None:
    done = run("demo", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    used = re.search(r"^checkpoint: (default|fast), for ", done.stdout)
    assert used is not None
    keys = dict(objects())
    assert 70 <= len(keys) <= 90
    assert f"{len(keys)} objects: 3 error, {len(keys) - 3} ok" in done.stdout
    assert re.search(r"flagged at alpha 0\.01: \d+ of \d+ scored, .*interval", done.stdout)
    assert "images/s" in done.stdout and "error row" in done.stdout
    printed = re.search(r"ledger: (\S+)", done.stdout)
    assert printed is not None
    rows = pq.read_table(printed[1]).to_pylist()
    assert Counter(r["error_code"] for r in rows if r["status"] == "error") == {
        "truncated": 1,
        "empty": 1,
        "unsupported_format": 1,
    }
    by_name = {row["uri"].split("/images/")[1]: row for row in rows}
    pairs = [
        (by_name[key]["score"], by_name[key.replace("edited/", "crops/")]["score"]) for key in keys if "edited/" in key
    ]
    assert sum(twin > natural for twin, natural in pairs) >= 0.9 * len(pairs)
    some = [key for key in keys if not key.startswith("broken/")][::15]
    for key, finding in zip(some, load_detector(used[1]).detect([keys[key] for key in some]), strict=True):
        assert abs(finding.score - by_name[key]["score"]) <= 1e-4
