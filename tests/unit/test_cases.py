"""The public cases beside the repository, if they are there: each input listed and read as an audit does."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from clipflow_ray.errors import InputError
from tests.accounts import account, counts

BUILD = Path(__file__).parents[3] / "shared/cases/build.py"
pytestmark = [
    pytest.mark.stress,  # making the cases takes a minute
    pytest.mark.skipif(not BUILD.exists(), reason="the cases are not here"),
]
# The rows by status, or what the refusal says. Where a README leaves a choice, the input is read.
EXPECTED: dict[str, dict[str, int] | str] = {
    "B01": {"ok": 4},
    "B02": {"ok": 4},
    "B04": {"ok": 4},
    "B05": {"ok": 4},
    "B06": {"ok": 4},
    "B07": {"ok": 1, "error": 5},
    "B08": {"ok": 4},
    "B09": {"ok": 4},
    "B10": {"ok": 4},
    "B11": "no column 'uri'; it has image, label. Set --uri-column",
    "B12": {"ok": 4},
    "B13": {"ok": 2, "error": 2},
    "B14": {"ok": 4},
    "B15": {"ok": 4},
    "B16": {"ok": 2},
    "B17": {"ok": 4},
    "B18": {"ok": 4},
    "B19": {"ok": 6},
    "C01": {"ok": 4},
    "C02": {"ok": 4},
    "C05": {"ok": 4},
    "C06": {"ok": 4},
    "C07": {"ok": 2, "error": 2},
    "C08": {"ok": 4, "skipped_not_image": 2},
    "C09": {"ok": 4},
    "C10": {"ok": 4},
    "C11": {"error": 4},  # an audit refuses an input of which no row may be read
    "C12": {"skipped_not_image": 1},
    "C13": {"ok": 8, "error": 1},
    "C14": {"error": 1},
    "C15": {"ok": 4},
    "C16": {"ok": 4},
    "C17": {"ok": 4},
    "D01": {"ok": 5, "skipped_not_image": 3},
    "D02": {"ok": 4},
    "D03": {"ok": 9, "error": 2},  # the cut shard still holds one whole picture; the cut one is an error, too
    "D04": {"ok": 4, "error": 1},
    "D06": {"ok": 4, "skipped_not_image": 5},
    "D07": {"ok": 4},
    "D08": {"ok": 8},
    "D10": {"ok": 4},
    "D11": {"ok": 4},
    "D12": {"ok": 4},
    "E01": {"ok": 4, "skipped_not_image": 11},
    "E02": {"ok": 5},
    "E03": {"ok": 4},
    "E04": {"ok": 4, "error": 2},
    "E05": {"ok": 4},
    "E06": {"ok": 4, "skipped_not_image": 1},
    "E07a": {"ok": 4},
    "E07b": {"ok": 4},
    "E09": {"ok": 10},
    "E10": {"ok": 4, "error": 1},
    "E11": {"ok": 4},
    "E12": {"ok": 8},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cases")
    environment = os.environ | {"CASES": str(root), "CLIPFLOW": "clipflow-ray"}
    subprocess.run([sys.executable, str(BUILD)], env=environment, check=True, capture_output=True)
    return {folder.name.partition("_")[0]: folder for folder in root.iterdir()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_comes_to_what_its_user_expects(
    name: str, cases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cases[name])
    command = next(line for line in (cases[name] / "run.sh").read_text().splitlines() if " audit " in line)
    words = shlex.split(command)
    given = dict(pairwise(words))
    named = ("--input-format", "--uri-column", "--bytes-column")
    options = {flag[2:].replace("-", "_"): given[flag] for flag in named if flag in given}
    expected = EXPECTED[name]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=re.escape(expected)):
            account(given["--input"], **options)
        return
    found = account(given["--input"], **options)
    assert counts(found) == expected
    assert all(row["error_message"] for row in found if row["status"] != "ok")
