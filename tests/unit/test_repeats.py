"""Duplicates and q-values, compared with the same values computed in memory."""

import hashlib
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from scipy import stats

from clipflow_ray.audit import repeats
from clipflow_ray.audit.repeats import numbered
from clipflow_ray.errors import ClipflowError

ROWS = 5000
CALIBRATION = 200


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Many repeated digests; one row in ten has no p-value and one in fifty has no digest."""
    rng = np.random.default_rng(0)
    digests = [hashlib.sha256(str(n).encode()).hexdigest() for n in rng.integers(0, ROWS // 2, ROWS)]
    p = (rng.integers(0, CALIBRATION + 1, ROWS) + 1.0) / (CALIBRATION + 1.0)
    return pa.table(
        {
            "row_id": [hashlib.md5(str(n).encode()).hexdigest() for n in range(ROWS)],
            "sha256": pa.array([None if n % 50 == 7 else digest for n, digest in enumerate(digests)], pa.string()),
            "p_value": pa.array([None if n % 10 == 7 else float(v) for n, v in enumerate(p)], pa.float32()),
        }
    )


@pytest.fixture
def scored(table: pa.Table, tmp_path: Path) -> list[pads.Dataset]:
    for at in range(0, ROWS, 800):
        pq.write_table(table.slice(at, 800), tmp_path / f"{at:05d}.parquet")
    files = sorted(map(str, tmp_path.iterdir()))
    return [pads.dataset(files[:3]), pads.dataset(files[3:])]


def test_a_duplicate_names_the_smallest_id_among_the_rows_with_the_same_bytes(
    table: pa.Table, scored: list[pads.Dataset]
) -> None:
    first: dict[str, str] = {}
    for identity, digest in sorted(zip(table["row_id"].to_pylist(), table["sha256"].to_pylist(), strict=True)):
        first.setdefault(digest or identity, identity)
    expected = [
        None if digest is None or first[digest] == identity else first[digest]
        for identity, digest in zip(table["row_id"].to_pylist(), table["sha256"].to_pylist(), strict=True)
    ]
    with numbered(scored) as rows:
        found = [name for start in range(0, ROWS, 999) for name in rows.repeated(start, min(999, ROWS - start))]
    assert found == expected and sum(name is not None for name in found) > 1000


@pytest.mark.parametrize("dedupe", [False, True])
def test_q_values_equal_those_computed_from_the_whole_table(
    table: pa.Table, scored: list[pads.Dataset], dedupe: bool
) -> None:
    p = table["p_value"].to_numpy().astype(np.float32)
    with numbered(scored) as rows:
        again = np.array([name is not None for name in rows.repeated(0, ROWS)])
        kept = ~np.isnan(p) & ~(again & dedupe)
        found = rows.q_values(dedupe)(np.where(kept, p, np.nan).astype(np.float32))
    np.testing.assert_allclose(found[kept], stats.false_discovery_control(p[kept]), rtol=1e-6)
    assert np.isnan(found[~kept]).all()


def test_an_audit_without_scores_has_no_q_values(tmp_path: Path) -> None:
    nothing = pa.table({"row_id": ["a"], "sha256": pa.nulls(1, pa.string()), "p_value": pa.nulls(1, pa.float32())})
    pq.write_table(nothing, tmp_path / "a.parquet")
    with numbered([pads.dataset(str(tmp_path / "a.parquet"))]) as rows:
        assert np.isnan(rows.q_values(False)(np.array([np.nan], np.float32))).all()


def test_a_full_disk_raises_an_error_that_says_what_to_do(
    scored: list[pads.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "_CACHE_KIB", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(ClipflowError, match="larger disk"), numbered(scored):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
