"""How far an audit is: `progress.json` beside the ledger, and a log line, every half minute."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.audit.ledger import SCORED
from clipflow_ray.runs.folder import Run
from clipflow_ray.storage import filesystem, write_text

log = logging.getLogger(__name__)

PROGRESS: Final = "progress.json"
SECONDS: Final = 30.0


@contextmanager
def reported(run: Run, total: int, seconds: float = SECONDS) -> Iterator[None]:
    """Report on `run` every `seconds` while the block runs, and once when it ends."""
    progress, stop = _Progress(run, total), threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            progress.report()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        progress.report()


class _Progress:
    """Counts what finished files hold; each file is read once."""

    def __init__(self, run: Run, total: int) -> None:
        self._run, self._total = run, total
        self._seen: set[str] = set()
        self._done, self._codes = 0, Counter[str]()
        self._count()
        self._before, self._start = self._done, time.monotonic()

    def report(self) -> None:
        """Write `progress.json` and log one line.

        A store that fails for a moment, or a file that is still being written, costs one report, not the run.
        """
        try:
            self._count()
            seconds = time.monotonic() - self._start
            rate = (self._done - self._before) / seconds if seconds else 0.0
            left = (self._total - self._done) / rate if rate else None
            state = {
                "done": self._done,
                "total": self._total,
                "objects_per_second": rate,
                "seconds_left": left,
                "errors": dict(sorted(self._codes.items())),
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_text(self._run.path(PROGRESS), json.dumps(state) + "\n", self._run.s3)
        except (OSError, pa.ArrowInvalid) as error:
            log.warning("progress was not written: %s", error)
            return
        eta = "" if left is None else f", {left / 60.0:.0f} min left"
        errors = sum(self._codes.values())
        log.info("%d of %d objects, %.1f/s%s, %d errors", self._done, self._total, rate, eta, errors)

    def _count(self) -> None:
        fs, _ = filesystem(self._run.folder, self._run.s3)
        for path in self._run.table(SCORED).files:
            if path not in self._seen:
                codes = pq.read_table(path, columns=["error_code"], filesystem=fs)["error_code"].to_pylist()
                self._seen.add(path)
                self._done += len(codes)
                self._codes.update(code for code in codes if code)
