"""Work on more rows than fit in memory: files that are read ahead, and temporary files that hold one share each."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray.errors import ClipflowError

Records = NDArray[np.void]
Text = NDArray[np.bytes_]
Places = NDArray[np.int64]

_NIBBLES: Final = np.zeros(256, np.int64)
_NIBBLES[list(b"0123456789abcdef")] = range(16)
_LEADING: Final = 4  # hex digits that decide on the share of an id

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def ahead(call: Callable[[ItemT], ResultT], items: Iterable[ItemT], threads: int, most: int) -> Iterator[ResultT]:
    """`call` of each item, in the order of the items. Threads work ahead; at most `most` results wait to be taken."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[ResultT]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # after an error, or if the caller stops early
                future.cancel()


def gathered(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in fewer tables, each of at least `rows` rows except for the last."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= rows:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


class Spill:
    """Records of one numpy dtype, in a temporary file for each share. Only one share has to fit in memory."""

    def __init__(self, folder: str | Path, dtype: np.dtype[np.void], shares: int) -> None:
        self._folder, self._dtype, self.shares = Path(folder), dtype, shares
        self._folder.mkdir()

    def add(self, records: Records, share: Places) -> None:
        """Append records [N] to their shares, int64 [N]; records of one share keep their order.

        Raises ClipflowError if the disk is full.
        """
        order = np.argsort(share, kind="stable")
        records, cuts = records[order], np.searchsorted(share[order], np.arange(self.shares + 1))
        with temporary_files():
            for at in np.flatnonzero(np.diff(cuts)).tolist():
                with self._path(at).open("ab") as file:
                    file.write(records[cuts[at] : cuts[at + 1]].tobytes())

    def read(self, share: int) -> Records:
        """The records of one share, in the order in which they were added."""
        path = self._path(share)
        return np.fromfile(path, self._dtype) if path.exists() else np.empty(0, self._dtype)

    def _path(self, share: int) -> Path:
        return self._folder / str(share)


@contextmanager
def temporary_files() -> Iterator[None]:
    """Raise ClipflowError, which says what to do, if the block cannot write a temporary file."""
    try:
        yield
    except OSError as error:
        raise ClipflowError(f"Writing temporary files failed: {error}. Set TMPDIR to a larger disk.") from error


def text(column: pa.ChunkedArray, width: int) -> Text:
    """A column of strings of `width` bytes each, without nulls -> numpy, `S<width>` [N]. Raises ArrowInvalid if not."""
    fixed: Any = column.cast(pa.binary(width)).combine_chunks()
    array = fixed.chunk(0) if isinstance(fixed, pa.ChunkedArray) and fixed.num_chunks else fixed
    if len(array) == 0:
        return np.empty(0, f"S{width}")
    return np.frombuffer(array.buffers()[1], f"S{width}", len(array), array.offset * width)


def share_of(ids: Text, shares: int) -> Places:
    """The share of each id, int64 [N], from 0 to `shares` - 1. Ids [N] begin with hex digits of a hash."""
    digits = _NIBBLES[ids.view(np.uint8).reshape(len(ids), ids.itemsize)[:, :_LEADING]]
    number = digits @ (16 ** np.arange(_LEADING - 1, -1, -1))
    place: Places = number * shares >> 4 * _LEADING
    return place
