"""The rows of an audit in the order of its ledger: by group, then by URI. Sorted in temporary files.

The order is cut into pieces that fit in memory. The cuts are keys of a sample of rows, so pieces are of about the same
size. Each table of rows is sorted and stored with a batch for each piece. A piece is made of its batches of all tables.
"""

from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipflow_ray.runs.bounded import Places, temporary_files

ORDER: Final = ("group", "uri", "member", "row_id")
_SORT_KEYS: Final[Any] = [(name, "ascending") for name in ORDER]
_ROWS: Final = 32_768
# There are as many tables as pieces, and each table has a batch for each piece. Because pieces grow as the square root
# of the audit, batches have this many rows or more. Smaller ones would take more time for their headers than for rows.
_ROWS_PER_BATCH: Final = 200


def rows_of_a_piece(rows: int) -> int:
    """The number of rows of a piece, and of a table that is sorted at once, for an audit of `rows` rows."""
    return max(_ROWS, isqrt(rows * _ROWS_PER_BATCH))


class Sorter:
    """Rows in temporary files below `folder`, given in any order and returned in pieces in the ledger's order.

    `sample` are rows with the columns of ORDER that stand for the others. Rows of equal keys are of the same row id.
    """

    def __init__(self, folder: str | Path, sample: pa.Table, pieces: int) -> None:
        self._folder = Path(folder)
        self._folder.mkdir()
        ordered = sample.select(ORDER).sort_by(_SORT_KEYS)
        self._cuts = ordered.take(np.arange(1, pieces) * len(ordered) // pieces)
        self.pieces, self._tables = pieces, 0

    def add(self, table: pa.Table) -> tuple[pa.Table, Places]:
        """Store rows [N]. Returns them sorted, with the piece of each, int64 [N].

        Raises ClipflowError if the disk is full.
        """
        order = _order(pa.concat_tables([table.select(ORDER), self._cuts]))
        is_cut = order >= len(table)
        ends = np.r_[0, np.flatnonzero(is_cut) - np.arange(self.pieces - 1), len(table)]
        table = table.combine_chunks().take(pa.array(order[~is_cut]))
        batch = _batch(table)
        with (
            temporary_files(),
            pa.OSFile(self._path(self._tables), "wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            for start, end in pairwise(ends.tolist()):
                writer.write_batch(batch.slice(start, end - start))
        self._tables += 1
        return table, np.repeat(np.arange(self.pieces), np.diff(ends))

    def piece(self, at: int) -> pa.Table:
        """The rows of piece number `at`, sorted; there may be none."""
        batches = []
        for number in range(self._tables):
            with pa.OSFile(self._path(number)) as file:
                batches.append(pa.ipc.open_file(file).get_batch(at))
        table = pa.Table.from_batches(batches).combine_chunks()
        del batches  # before the rows are copied again
        return table.take(pa.array(_order(table.select(ORDER))))

    def _path(self, number: int) -> str:
        return str(self._folder / f"{number}.arrow")


def _order(keys: pa.Table) -> Places:
    order: Places = pc.sort_indices(_batch(keys), sort_keys=_SORT_KEYS).to_numpy().astype(np.int64)
    return order


def _batch(table: pa.Table) -> pa.RecordBatch:
    """The table as one batch. Arrow sorts a batch faster than a table."""
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)
