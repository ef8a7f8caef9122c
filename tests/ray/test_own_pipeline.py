"""The detector as a stage of somebody's own Ray Data pipeline, as docs/operating.md shows it."""

import re
from pathlib import Path

import numpy as np
import pytest
import ray

from clipflow_ray.model.detector import Detector
from clipflow_ray.ray import Detect
from tests.conftest import encoded, photo

DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"


@pytest.mark.real_weights
def test_the_example_of_the_documents_runs(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at in range(3):
        (tmp_path / f"{at}.jpg").write_bytes(encoded(photo(at, (240, 320)), quality=90))
    (example,) = [
        block for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL) if "Detect" in block
    ]
    assert '"photos/"' in example
    exec(compile(example.replace('"photos/"', repr(str(tmp_path))), str(DOCUMENT), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.count(".jpg") == 3


def test_each_row_is_kept_and_has_the_finding_that_the_detector_gives(cluster: None, trained: str) -> None:
    pictures = [encoded(photo(at, (240, 256 + at)), quality=80) for at in range(5)]
    rows = [{"score": at, "bytes": data} for at, data in enumerate([*pictures, b"text", None])]
    arguments = {"checkpoint": trained, "alpha": 0.1}
    data = ray.data.from_items(rows).map_batches(Detect, fn_constructor_kwargs=arguments, concurrency=1, batch_size=4)
    found = sorted(data.take_all(), key=lambda row: row["score"])
    assert [row["bytes"] for row in found] == [row["bytes"] for row in rows]
    expected = Detector.from_checkpoint(trained, "cpu").detect(pictures, 0.1)
    for row, finding in zip(found, expected, strict=False):
        assert (row["clipflow_verdict"], row["clipflow_stratum"]) == (finding.verdict, finding.stratum)
        assert row["clipflow_error_code"] is None and row["clipflow_error_message"] is None
        assert row["clipflow_score"] == pytest.approx(finding.score, rel=1e-5)
        assert row["clipflow_p_value"] == pytest.approx(finding.p_value, rel=1e-5)
    bad, null = found[-2:]
    assert null["clipflow_error_code"] == "empty"
    assert bad["clipflow_error_code"] == "unsupported_format" and bad["clipflow_verdict"] is None
    assert np.isnan(bad["clipflow_score"]) and "no image" in bad["clipflow_error_message"]
