"""Progress of a running audit, every 30 seconds: `progress.json` beside the ledger and a log line."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from clipflow_ray.audit.ledger import SCORED
from clipflow_ray.runs.folder import Run

log = logging.getLogger(__name__)

PROGRESS: Final = "progress.json"
SECONDS: Final = 30.0


@contextmanager
def reported(run: Run, total: int, seconds: float = SECONDS) -> Iterator[None]:
    """Report on `run` every `seconds` while the block runs, and once when it ends. `total` is its number of objects."""
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
    """Counts the rows of finished files; each file is read once."""

    def __init__(self, run: Run, total: int) -> None:
        self._run, self._total = run, total
        self._seen: set[str] = set()
        self._done, self._codes = 0, Counter[str]()
        self._count()
        self._before, self._start = self._done, time.monotonic()

    def report(self) -> None:
        """Write `progress.json` and log one line.

        If the store fails for a moment, this report is skipped and the run goes on.
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
            (self._run.place / PROGRESS).write(json.dumps(state) + "\n")
        except OSError as error:
            log.warning("progress was not written: %s", error)
            return
        eta = "" if left is None else f", {left / 60.0:.0f} min left"
        errors = sum(self._codes.values())
        log.info("%d of %d objects, %.1f/s%s, %d errors", self._done, self._total, rate, eta, errors)

    def _count(self) -> None:
        for name in self._run.files(SCORED):
            if name not in self._seen:
                table = (self._run.place / SCORED / name).read_parquet(["error_code"])
                codes = table["error_code"].to_pylist()
                self._seen.add(name)
                self._done += len(codes)
                self._codes.update(code for code in codes if code)
