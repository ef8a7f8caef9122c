"""Distributions counted in batches, against what all values at once give."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from scipy import stats

from clipflow_ray.audit.distribution import Distribution, median

RNG = np.random.default_rng(0)
CALIBRATION = np.sort(RNG.normal(size=500)).astype(np.float32)
SCORES = (RNG.normal(size=3000) * 1.2 + 0.3).astype(np.float32)


@pytest.mark.parametrize("decimals", [6, 1])
def test_distance_and_histograms_are_those_of_all_scores_at_once(decimals: int) -> None:
    calibration, scores = np.round(CALIBRATION, decimals), np.round(SCORES, decimals)
    p = RNG.uniform(size=len(scores)).astype(np.float32)
    counted = Distribution(calibration)
    for some, some_p in zip(np.array_split(scores, 7), np.array_split(p, 7), strict=True):
        counted.add(some, some_p)
    expected = stats.ks_2samp(scores, calibration, method="asymp")
    assert counted.distance() == pytest.approx((expected.statistic, expected.pvalue))
    edges = np.array(counted.histogram()["edges"])
    clipped = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0]
    np.testing.assert_allclose(counted.histogram()["audit"], clipped / len(scores))
    assert sum(counted.histogram()["calibration"]) == pytest.approx(1.0)
    assert counted.p_values() == np.histogram(p, 20, (0.0, 1.0))[0].tolist()


def test_the_median_is_close_and_of_the_wanted_rows_alone(tmp_path: Path) -> None:
    status = ["ok"] * len(SCORES) + ["error"] * 900
    values = pa.array([*SCORES.tolist(), *[99.0] * 900], pa.float32())
    pq.write_table(pa.table({"score": values, "status": status}), tmp_path / "a.parquet")
    rows = pads.dataset(str(tmp_path / "a.parquet"))
    assert median(rows, "score", pc.field("status") == "ok") == pytest.approx(float(np.median(SCORES)), abs=0.02)
    assert median(rows, "score", pc.field("status") == "none") is None
