"""Equal files of a whole audit, found in bounded memory: rows are divided by their digests into temporary files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipflow_ray.runs.bounded import Places, Records, Spill, share_of, text

_ROWS_PER_SHARE: Final = 262_144
_ROW: Final = np.dtype([("digest", "S64"), ("id", "S32"), ("p", np.float32), ("piece", np.int64)])
_REPEAT: Final = np.dtype([("id", "S32"), ("first", "S32")])


class Repeats:
    """The rows of an audit that have the bytes of another row with a smaller id.

    `rows` is about the number of all rows. Add all rows, then call `find`, then ask for pieces.
    """

    def __init__(self, folder: str | Path, rows: int, pieces: int) -> None:
        self._rows = Spill(Path(folder) / "digests", _ROW, 1 + rows // _ROWS_PER_SHARE)
        self._found = Spill(Path(folder) / "repeats", _REPEAT, pieces)

    def add(self, table: pa.Table, piece: Places) -> None:
        """Add rows with row_id, sha256 and p_value, and the piece of each, int64 [N]. A row without sha256 has none."""
        present = table["sha256"].is_valid()
        read = table.filter(present)
        records: Records = np.empty(len(read), _ROW)
        records["digest"], records["id"] = text(read["sha256"], 64), text(read["row_id"], 32)
        records["p"] = read["p_value"].to_numpy()
        records["piece"] = piece[present.to_numpy()]
        self._rows.add(records, share_of(records["digest"].copy(), self._rows.shares))

    def find(self) -> Iterator[NDArray[np.float32]]:
        """Find the repeats. Yields p-values of all of them, float32 [N] in parts; NaN for a row without a p-value."""
        for share in range(self._rows.shares):
            same = _with_others(self._rows.read(share))
            same = same[np.lexsort((same["id"], same["digest"]))]
            starts = np.r_[True, same["digest"][1:] != same["digest"][:-1]][: len(same)]
            first = np.maximum.accumulate(np.where(starts, np.arange(len(same)), 0))
            again = same[~starts]
            found: Records = np.empty(len(again), _REPEAT)
            found["id"], found["first"] = again["id"], same["id"][first[~starts]]
            self._found.add(found, again["piece"])
            yield again["p"]

    def first(self, piece: int, row_ids: pa.ChunkedArray) -> pa.Array:
        """`dup_of` of rows [N] of one piece: the smallest id among the rows with the same bytes; null for that row."""
        found = self._found.read(piece)
        ids, firsts = (pa.array(found[name].copy()).cast(pa.string()) for name in ("id", "first"))
        return firsts.take(pc.index_in(row_ids, ids).combine_chunks())


def _with_others(rows: Records) -> Records:
    """The rows whose digest ends as that of another row does: all that are equal to another, and few besides."""
    ends = rows["digest"].copy().view(np.uint64)[7::8]
    order = np.argsort(ends)  # ends: the last 8 of the 64 digits
    next_same = np.r_[ends[order][1:] == ends[order][:-1], False][: len(rows)]
    found: Records = rows[order[next_same | np.r_[False, next_same[:-1]][: len(rows)]]]
    return found
