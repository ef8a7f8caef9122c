"""One run writes to an output at a time: a second one is refused.

On disk it is a lock that the kernel releases when its holder dies. On S3 it is an object written under a condition and
renewed while the run lives; one that is no longer renewed is taken over, and a run that finds its own taken over stops.
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
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError

from clipflow_ray.config import S3Options
from clipflow_ray.errors import RunConflictError
from clipflow_ray.storage import is_s3, join, s3_client, split_s3

log = logging.getLogger(__name__)

NAME: Final = ".lease"
RENEW_SECONDS: Final = 10.0
_STALE_RENEWALS: Final = 3


@contextmanager
def exclusive(folder: str, s3: S3Options) -> Iterator[None]:
    """Hold `folder` for the time of the block.

    Raises RunConflictError where another run holds it, and in the midst of the block (on the main thread; at its end
    on another) where another run took it over.
    """
    with _object_lease(folder, s3) if is_s3(folder) else _file_lock(folder):
        yield


@contextmanager
def _file_lock(folder: str) -> Iterator[None]:
    os.makedirs(folder, exist_ok=True)
    with open(join(folder, NAME), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunConflictError(
                f"Another run writes to {folder} now; wait for it or name another output."
            ) from error
        yield


@contextmanager
def _object_lease(folder: str, s3: S3Options) -> Iterator[None]:
    lease = _ObjectLease(folder, s3)
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
    """A function that raises KeyboardInterrupt in this block, wherever it waits; on the main thread alone.

    Not through SIGINT: a shell's background jobs ignore that.
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


class _ObjectLease:
    def __init__(self, folder: str, s3: S3Options) -> None:
        self._folder, self._client = folder, s3_client(s3)
        self._bucket, self._key = split_s3(join(folder, NAME))
        self._token, self._renewals = secrets.token_hex(8), 0
        self._etag = ""
        self._taken_by: dict[str, Any] | None = None

    @property
    def lost(self) -> bool:
        """Whether another run took the lease over."""
        return self._taken_by is not None

    def conflict(self) -> RunConflictError:
        """What to say where it is lost."""
        return RunConflictError(
            f"Another run{_where(self._taken_by)} took {self._folder} over while this one could not renew its lease, "
            "so this one stopped. What it finished is kept."
        )

    def take(self) -> None:
        """Write the lease where there is none, or where nobody renews the one that is there."""
        try:
            self._put(IfNoneMatch="*")
            return
        except ClientError as error:
            if not _refused(error):
                raise
        before = self._holder()
        if before is not None:
            log.info("waiting to see whether the run that holds %s is alive", self._folder)
            time.sleep(_STALE_RENEWALS * RENEW_SECONDS)
        now = self._holder()
        try:
            if now is None:
                self._put(IfNoneMatch="*")
                return
            if before is not None and now["etag"] == before["etag"]:
                self._put(IfMatch=now["etag"])
                return
        except ClientError as error:
            if not _refused(error):
                raise
        raise RunConflictError(
            f"Another run{_where(now)} writes to {self._folder} now; wait for it or name another output."
        )

    def renew_until(self, stop: threading.Event, taken: Callable[[], None]) -> None:
        """Write the lease anew every few seconds, under the condition that it is still ours; call `taken` if not."""
        while not stop.wait(RENEW_SECONDS):
            try:
                self._put(IfMatch=self._etag)
            except (ClientError, BotoCoreError) as error:
                log.warning("the lease on %s was not renewed: %s", self._folder, error)
                if isinstance(error, ClientError) and _refused(error) and self._is_taken():
                    taken()
                    return

    def release(self) -> None:
        """Delete the lease if it is still ours."""
        holder = self._holder()
        if holder is not None and holder["etag"] == self._etag:
            self._client.delete_object(Bucket=self._bucket, Key=self._key)

    def _put(self, **condition: str) -> None:
        self._renewals += 1
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "run": self._token, "renewals": self._renewals}
        body = json.dumps(holder).encode()
        self._etag = self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, **condition)["ETag"]

    def _is_taken(self) -> bool:
        """Whether the lease is another run's, or gone; ours where only the answer to a renewal was lost."""
        try:
            holder = self._holder()
        except (ClientError, BotoCoreError):
            return False  # not known yet: the next renewal asks again
        if holder is not None and holder.get("run") == self._token:
            self._etag = holder["etag"]
            return False
        self._taken_by = holder or {}
        return True

    def _holder(self) -> dict[str, Any] | None:
        try:
            response = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except ClientError as error:
            if error.response["Error"]["Code"] in {"NoSuchKey", "404"}:
                return None
            raise
        found: dict[str, Any] = json.loads(response["Body"].read())
        return found | {"etag": response["ETag"]}


def _where(holder: dict[str, Any] | None) -> str:
    return f" ({holder['host']}, process {holder['pid']})" if holder else ""


def _refused(error: ClientError) -> bool:
    """Whether the condition did not hold; a lease that is to be matched and is gone is NoSuchKey."""
    codes = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
    return error.response["Error"]["Code"] in codes
