"""The rows that a resumed run has to process."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipflow_ray.place import Place
from clipflow_ray.runs import resume
from clipflow_ray.runs.resume import write_left

IDS = [hashlib.md5(str(at).encode()).hexdigest() for at in range(1000)]
FILES = ("part-00000-00000.parquet", "part-00001-00000.parquet", "part-00001-00001.parquet")


@pytest.fixture
def manifest(tmp_path: Path) -> Place:
    (tmp_path / "manifest").mkdir()
    for name, start, end in zip(FILES, (0, 300, 600), (300, 600, 1000), strict=True):
        table = pa.table({"row_id": IDS[start:end], "uri": [f"/in/{at}" for at in range(start, end)]})
        pq.write_table(table, tmp_path / "manifest" / name)
    return Place.at(tmp_path / "manifest")


@pytest.mark.parametrize("ids_per_share", [100, 262_144])
def test_exactly_the_rows_whose_ids_are_not_finished_are_left_in_their_order(
    manifest: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids_per_share: int
) -> None:
    monkeypatch.setattr(resume, "_IDS_PER_SHARE", ids_per_share)
    # the second file is finished, and half of the others
    finished = [identity for at, identity in enumerate(IDS) if 300 <= at < 600 or at % 2]
    order = np.random.default_rng(0).permutation(len(finished))
    tables = [pa.table({"row_id": [finished[at] for at in some]}) for some in np.array_split(order, 30)]
    left = Place.at(tmp_path / "left")
    assert write_left(manifest, FILES, len(IDS), tables, left) == 350
    assert left.names() == [FILES[0], FILES[2]]
    found = pa.concat_tables([(left / name).read_parquet() for name in left.names()]).to_pydict()
    expected = [at for at in range(1000) if not (300 <= at < 600 or at % 2)]
    assert found == {"row_id": [IDS[at] for at in expected], "uri": [f"/in/{at}" for at in expected]}


def test_nothing_is_left_of_a_finished_part(manifest: Place, tmp_path: Path) -> None:
    left = Place.at(tmp_path / "left")
    assert write_left(manifest, FILES, len(IDS), [pa.table({"row_id": IDS})], left) == 0
    assert left.names() == []
