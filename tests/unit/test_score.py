"""`clipflow-ray score` on files, folders, patterns and archives, with the test tower."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from clipflow_ray.cli import app
from clipflow_ray.config import TEST_TOWER, EncoderConfig, FlowConfig, ImageLimits, Segment
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint, save_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.weights import load_record
from tests.accounts import BESIDE, NAMES, PICTURES, tar, write

TOWER = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
SEGMENTS = (Segment(feature="projected", size=224),)
SETTINGS = FlowConfig(blocks=2, hidden=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose flow is of no use, but whose scores are numbers."""
    torch.manual_seed(0)
    flow = Flow((32,), SETTINGS)
    flow.fit_standardizer(torch.randn(64, 32))
    folder = tmp_path_factory.mktemp("score") / "checkpoint"
    made = Checkpoint(
        encoder=TOWER,
        encoder_fingerprint=Encoder(TOWER, SEGMENTS, "cpu").fingerprint,
        view=load_record(TOWER).view,
        segments=SEGMENTS,
        widths=(32,),
        flow_config=SETTINGS,
        flow_state=flow.state_dict(),
        limits=ImageLimits(),
        calibration=Calibration.fit(np.linspace(-9, 9, 199, dtype=np.float32), ["jpeg|0-256"] * 199),
    )
    save_checkpoint(made, folder)
    return str(folder)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def score(checkpoint: str, *arguments: str) -> int:
    """The exit code."""
    try:
        typer.main.get_command(app).main(["score", "--checkpoint", checkpoint, *arguments], standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_folder_is_scored_and_ends_with_the_rate_of_each_group(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", [*BESIDE, ("cats/a.jpg", PICTURES[0]), ("p0.txt", b"words")])
    assert score(checkpoint, "in") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert sorted(line.split(": ")[0] for line in lines[:5]) == ["in/cats/a.jpg", *(f"in/{name}" for name in NAMES)]
    assert lines[5:7] == ["", "group  flagged      of   share"]
    assert [line.split()[0] for line in lines[7:]] == ["cats", "in", "all"]
    assert lines[-1].split()[2] == "5"
    assert "left out: 1 files that are no images" in err


def test_archives_and_patterns_are_scored_as_csv(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar(tmp_path / "s.tar", BESIDE[:1])
    write(tmp_path / "in")
    assert score(checkpoint, "s.tar", "in/p{1,2}.jpg", "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == ["s.tar : p0.jpg", "in/p1.jpg", "in/p2.jpg"]
    assert all(row["status"] == "ok" and 0 < float(row["p_value"]) <= 1 and not row["error_code"] for row in rows)


def test_one_missing_file_does_not_stop_the_others(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", [*BESIDE[:2], ("bad.jpg", b"words")])
    names = ["in/p0.jpg", "in/gone.jpg", "https://example.org/a.jpg", "in/bad.jpg", "in/p1.jpg"]
    assert score(checkpoint, *names, "--json") == 3
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [(each["index"], each["file"], each["status"]) for each in found] == [
        (at, name, "ok" if name in ("in/p0.jpg", "in/p1.jpg") else "error") for at, name in enumerate(names)
    ]
    assert "gone.jpg" in found[1]["error"]["message"] and "https://" in found[2]["error"]["message"]
    assert found[3]["error"]["code"] == "unsupported_format"
    assert "3 of 5 images could not be scored" in err


def test_the_exit_code_is_1_if_nothing_was_scored(checkpoint: str, tmp_path: Path) -> None:
    write(tmp_path / "in", [("notes.txt", b"words")])
    assert score(checkpoint, "in") == 1
    assert score(checkpoint, "gone.jpg") == 1
