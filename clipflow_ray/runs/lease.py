"""The lease of an output: only one run at a time may write to it, and a second run is refused.

On disk, the lease is a file lock, which the kernel releases when the process ends. On S3, the lease is an object that
is written conditionally and renewed while the run lives. A lease that is no longer renewed may be taken over. A run
stops when it finds that another run took its lease over.
"""

import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from clipflow_ray.errors import RunConflictError
from clipflow_ray.place import Place

log = logging.getLogger(__name__)

NAME: Final = ".lease"
RENEW_SECONDS: Final = 10.0
_STALE_RENEWALS: Final = 3


@contextmanager
def exclusive(folder: Place) -> Iterator[None]:
    """Hold `folder` for the time of the block.

    Raises RunConflictError if another run holds it. If another run takes the lease over during the block, the error is
    raised inside the block on the main thread, and at the end of the block on any other thread.
    """
    with _file_lock(folder) if folder.is_local else _object_lease(folder):
        yield


@contextmanager
def _file_lock(folder: Place) -> Iterator[None]:
    folder.make_folder()
    with open((folder / NAME).uri, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunConflictError(
                f"Another run writes to {folder.uri} now; wait for it or name another output."
            ) from error
        yield


@contextmanager
def _object_lease(folder: Place) -> Iterator[None]:
    lease = _ObjectLease(folder)
    lease.take()
    stop = threading.Event()
    with _interruptible() as interrupt:
        renewing = threading.Thread(target=lease.renew_until, args=(stop, interrupt), daemon=True)
        renewing.start()
        try:
            try:
                yield
            finally:
                stop.set()
                renewing.join()
        except KeyboardInterrupt as error:
            if not lease.lost:
                raise
            raise lease.conflict() from error
        finally:
            lease.release()
    if lease.lost:
        raise lease.conflict()


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """A function that raises KeyboardInterrupt in this block, even while the block waits.

    Off the main thread, the function does nothing. It does not use SIGINT, which background jobs of a shell ignore.
    """
    here = threading.current_thread()
    if here is not threading.main_thread():
        yield lambda: None
        return
    identity = threading.get_ident()
    before = signal.signal(signal.SIGUSR2, signal.default_int_handler)
    try:
        yield lambda: signal.pthread_kill(identity, signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


@dataclass(frozen=True)
class _Holder:
    """The run that holds a lease: its host, process id and token, and the ETag of the lease object."""

    host: str
    pid: int
    run: str
    etag: str


class _ObjectLease:
    def __init__(self, folder: Place) -> None:
        self._folder, self._object = folder.uri, folder / NAME
        self._token, self._renewals = secrets.token_hex(8), 0
        self._etag: str | None = None
        self._taken_by: _Holder | None = None
        self.lost = False  # whether another run took the lease over

    def conflict(self) -> RunConflictError:
        """The error to raise if the lease is lost."""
        return RunConflictError(
            f"Another run{_in_brackets(self._taken_by)} took {self._folder} over while this run could not renew its "
            "lease. This run stopped; its finished work is kept."
        )

    def take(self) -> None:
        """Write the lease if there is none, or take over one that nobody renews; else raise RunConflictError."""
        if self._put(None):
            return
        before = self._holder()
        if before is not None:
            log.info("waiting to see whether the run that holds %s is alive", self._folder)
            time.sleep(_STALE_RENEWALS * RENEW_SECONDS)
        now = self._holder()
        if now is None:
            if self._put(None):
                return
        elif before is not None and now.etag == before.etag and self._put(now.etag):
            return
        raise RunConflictError(
            f"Another run{_in_brackets(now)} writes to {self._folder} now; wait for it or name another output."
        )

    def renew_until(self, stop: threading.Event, taken: Callable[[], None]) -> None:
        """Renew the lease every RENEW_SECONDS until `stop` is set. Call `taken` and return if the lease is lost."""
        while not stop.wait(RENEW_SECONDS):
            try:
                renewed = self._put(self._etag)
            except OSError as error:
                log.warning("the lease on %s was not renewed: %s", self._folder, error)
                continue
            if not renewed:
                log.warning("the lease on %s was not renewed: its object has changed or is gone", self._folder)
                if self._is_taken():
                    taken()
                    return

    def release(self) -> None:
        """Delete the lease if it is still ours."""
        holder = self._holder()
        if holder is not None and holder.etag == self._etag:
            self._object.delete()

    def _put(self, etag: str | None) -> bool:
        """Write the lease if it still has `etag`, or if there is none yet; returns whether it was written."""
        self._renewals += 1
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "run": self._token, "renewals": self._renewals}
        written = self._object.write_if(json.dumps(holder).encode(), etag)
        self._etag = written or self._etag
        return written is not None

    def _is_taken(self) -> bool:
        """Whether the lease is another run's, or gone. If only the answer to a renewal was lost, it is still ours."""
        try:
            holder = self._holder()
        except OSError:
            return False  # unknown: the next renewal checks again
        if holder is not None and holder.run == self._token:
            self._etag = holder.etag
            return False
        self._taken_by, self.lost = holder, True
        return True

    def _holder(self) -> _Holder | None:
        stored = self._object.read_with_etag()
        if stored is None:
            return None
        found = json.loads(stored[0])
        return _Holder(found["host"], found["pid"], found["run"], stored[1])


def _in_brackets(holder: _Holder | None) -> str:
    return f" ({holder.host}, process {holder.pid})" if holder else ""
