"""Which rows of a manifest are not finished, found in bounded memory.

Ray Data's own filter holds the ids of all finished rows in each of its actors: 84 MiB for a million rows. Here ids are
divided by their first digits into temporary files, and one share of them is compared at a time.
"""

from collections.abc import Iterable, Sequence
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipflow_ray.place import Place
from clipflow_ray.runs.bounded import Spill, gathered, share_of, text

_IDS_PER_SHARE: Final = 262_144
_ROWS_PER_GROUP: Final = 10_000
_FINISHED: Final = np.dtype([("id", "S32")])
_LISTED: Final = np.dtype([("id", "S32"), ("number", np.int64)])


def write_left(manifest: Place, files: Sequence[str], rows: int, finished: Iterable[pa.Table], folder: Place) -> int:
    """Write the rows of a manifest that are not finished into `folder`, and return their number.

    The manifest has `rows` rows in `files`; a file of rows that are left has the name of the file that they are from.
    `finished` are tables with row_id. Raises ClipflowError if the temporary directory is full: it takes 75 bytes a row.
    """
    shares = 1 + rows // _IDS_PER_SHARE
    with TemporaryDirectory(prefix="clipflow-ray-") as temporary:
        done, listed = Spill(f"{temporary}/done", _FINISHED, shares), Spill(f"{temporary}/listed", _LISTED, shares)
        for table in gathered(finished, _IDS_PER_SHARE):
            ids = text(table["row_id"], 32)
            done.add(ids.view(_FINISHED), share_of(ids, shares))
        start = 0
        for name in files:
            ids = text((manifest / name).read_parquet(["row_id"])["row_id"], 32)
            records = np.empty(len(ids), _LISTED)
            records["id"], records["number"] = ids, np.arange(start, start + len(ids))
            listed.add(records, share_of(ids, shares))
            start += len(ids)
        left = np.memmap(f"{temporary}/left", bool, "w+", shape=(max(1, start),))
        for share in range(shares):
            records = listed.read(share)
            known = pc.is_in(pa.array(records["id"].copy()), pa.array(done.read(share)["id"].copy()))
            left[records["number"]] = ~known.to_numpy(zero_copy_only=False)
        start = 0
        for name in files:
            table = (manifest / name).read_parquet()
            kept = table.filter(pa.array(left[start : start + len(table)]))
            start += len(table)
            if len(kept):
                (folder / name).write_parquet(kept, _ROWS_PER_GROUP)
        return int(left[:start].sum())
