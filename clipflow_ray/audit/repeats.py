"""Duplicates and q-values of a whole audit in bounded memory: rows are spilled to a temporary SQLite file."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow.dataset as pads
from numpy.typing import NDArray

from clipflow_ray.errors import ClipflowError

_CACHE_KIB: Final = 8 * 1024
_REPEATS: Final = """
INSERT INTO repeats SELECT number, first FROM (
  SELECT number, FIRST_VALUE(id) OVER same AS first, ROW_NUMBER() OVER same AS place FROM rows
  WHERE digest IS NOT NULL WINDOW same AS (PARTITION BY digest ORDER BY id)
) WHERE place > 1 ORDER BY number
"""


class Rows:
    """The scored rows by number, with their ids, digests and p-values. Made by `numbered`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def repeated(self, start: int, count: int) -> list[str | None]:
        """For `count` rows from number `start`: the id of the first row with the same bytes; None for that row itself.

        The first row is that with the smallest id, because a resumed run may write its rows in another order.
        """
        query = "SELECT number, first FROM repeats WHERE number BETWEEN ? AND ?"
        found = dict(self._database.execute(query, (start, start + count - 1)).fetchall())
        return [found.get(number) for number in range(start, start + count)]

    def q_values(self, dedupe: bool) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """A function from p-values [N] to their Benjamini-Hochberg q-values [N] among all rows; NaN gives NaN.

        With `dedupe`, duplicates do not count. The result is exact: n calibration scores allow only n + 1 different
        p-values, so it is computed from how often each of them occurs.
        """
        others = "AND number NOT IN (SELECT number FROM repeats)" if dedupe else ""
        counted = f"SELECT p, COUNT(*) FROM rows WHERE p IS NOT NULL {others} GROUP BY p ORDER BY p"
        table = np.array(self._database.execute(counted).fetchall(), float).reshape(-1, 2)
        p, ranks = table[:, 0], np.cumsum(table[:, 1])
        q = np.minimum(1.0, np.minimum.accumulate((p * ranks[-1:] / ranks)[::-1])[::-1]) if len(p) else p

        def looked_up(values: NDArray[np.float32]) -> NDArray[np.float32]:
            result = np.full(len(values), np.nan, np.float32)
            known = np.isin(values, p)
            result[known] = q[np.searchsorted(p, values[known])]
            return result

        return looked_up


@contextmanager
def numbered(scored: Iterable[pads.Dataset]) -> Iterator[Rows]:
    """The rows of all parts of `scored`, numbered from 0 in their order.

    While the block runs, a row takes about 250 bytes in the temporary directory. Raises ClipflowError if the directory
    is full.
    """
    database = sqlite3.connect("")  # the empty name means a temporary file, deleted on close
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, id TEXT, digest BLOB, p REAL)")
        database.execute("CREATE TABLE repeats (number INTEGER PRIMARY KEY, first TEXT)")
        database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", _values(scored))
        database.execute(_REPEATS)
        yield Rows(database)
    except sqlite3.OperationalError as error:
        raise ClipflowError(f"Finding equal files failed: {error}. Set TMPDIR to a larger disk.") from error
    finally:
        database.close()


def _values(scored: Iterable[pads.Dataset]) -> Iterator[tuple[Any, ...]]:
    number = 0
    for part in scored:
        for batch in part.to_batches(columns=["row_id", "sha256", "p_value"]):
            for identity, digest, p in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield number, identity, digest and bytes.fromhex(digest), p
                number += 1
