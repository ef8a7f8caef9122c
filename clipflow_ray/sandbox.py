"""Run `images.decode` in a child process that may be killed: a hanging or crashing decoder costs one image only.

A decoding thread could not be stopped, and a crash would end its whole process. So untrusted bytes go through a socket
to a child process, and pixels come back. The child process has limits on time and memory, and can open no file and no
connection. It is forked from a zygote process that has already imported all modules, so a replacement is ready at once.
The zygote process has no secrets: its environment holds only what Python needs to start. No data is pickled.
"""

import json
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from clipflow_ray import images
from clipflow_ray.config import OPENAI_VIEW, ImageLimits, ViewSpec
from clipflow_ray.errors import ImageError, ItemError
from clipflow_ray.images import DecodedImage

_HEADER: Final = struct.Struct(">IQ")  # length of the JSON and of the payload, in bytes
_BUFFER: Final = 2**20  # holds the views of an image, so that a child process does not wait until its answer is read
_PID: Final = struct.Struct(">I")
_START_SECONDS: Final = 60.0
_ATTEMPTS: Final = 3
_WINDOW: Final = 2  # images sent to a child process at a time: the one that it decodes and the next
_MEMORY: Final = 2 * 2**30
_CPU_SECONDS_BEYOND: Final = 2  # beyond max_seconds, the kernel ends a child process whose parent is dead
_PROCESS_CLOCK: Final = 2  # CPUCLOCK_SCHED: with a pid it makes the number of that process's clock, as in glibc
_LOOK_SECONDS: Final = 0.01


def decode(data: bytes, limits: ImageLimits, spec: ViewSpec | None = None) -> DecodedImage:
    """Decode one image in the child process of this process. With `spec`, `rgb` holds its views; see `images.views`.

    Raises ImageError with the codes of `images.decode`, decode_timeout or decoder_crash. Raises ItemError with the code
    internal if no child process can be started. Raises TypeError if `data` is not of type bytes.
    """
    return _child().decode(data, limits, spec)


def decode_all(
    contents: Sequence[bytes], limits: ImageLimits, spec: ViewSpec | None = None
) -> list[DecodedImage | ItemError]:
    """Decode several images, in their order. The error of an image is returned in its place and not raised.

    While one image is decoded, the next one is already sent to the child process. Raises TypeError before any image is
    sent if one of them is not of type bytes.
    """
    return _child().decode_all(contents, limits, spec)


class DecodeChild:
    """One child process, started at its first image and replaced if it has died. One thread uses it at a time."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child process, or None if none runs."""
        return self._pid

    def decode(self, data: bytes, limits: ImageLimits, spec: ViewSpec | None = None) -> DecodedImage:
        """See the module's `decode`."""
        (outcome,) = self.decode_all([data], limits, spec)
        if isinstance(outcome, ItemError):
            raise outcome
        return outcome

    def decode_all(
        self, contents: Sequence[bytes], limits: ImageLimits, spec: ViewSpec | None = None
    ) -> list[DecodedImage | ItemError]:
        """See the module's `decode_all`."""
        contents = list(contents)
        for data in contents:
            if not isinstance(data, bytes):
                raise TypeError(f"An encoded image is bytes, not {type(data).__name__}.")
        request = json.dumps({"limits": limits.model_dump(), "view": spec and spec.model_dump()}).encode()
        outcomes: list[DecodedImage | ItemError] = []
        sent = attempts = 0
        with self._lock:
            while len(outcomes) < len(contents):
                try:
                    connection = self._socket or self._start()
                    watch = _Watch(self._pid, limits.max_seconds, limits.max_wall_seconds)
                    for data in contents[sent : len(outcomes) + _WINDOW]:
                        _send(connection, request, data, watch)
                        sent += 1
                    outcome: DecodedImage | ItemError = _outcome(*_receive(connection, watch))
                except TimeoutError as error:
                    self._kill()
                    self._stop()
                    outcome = ImageError("decode_timeout", str(error))
                except (EOFError, ConnectionError):  # it died while decoding the first unanswered image
                    self._stop()
                    sent, attempts = len(outcomes), attempts + 1
                    if attempts < _ATTEMPTS:
                        continue
                    outcome = ImageError("decoder_crash", f"The decoder crashed on this image {_ATTEMPTS} times.")
                except ItemError as error:  # no child process can be started
                    outcome = error
                except BaseException:
                    self._stop()  # its late answers would be taken for those of the next call
                    raise
                outcomes.append(outcome)
                attempts = 0
                if self._socket is None:
                    sent = len(outcomes)
        return outcomes

    def close(self) -> None:
        """Stop the child process. The next image starts another one."""
        with self._lock:
            self._stop()

    def _start(self) -> socket.socket:
        self._pid, self._socket = _zygote().child()
        return self._socket

    def _kill(self) -> None:
        """Kill only a live child: a dead one's pid may be reused."""
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _stop(self) -> None:
        """Close the socket, which ends a child process that waits for its next image."""
        if self._socket is not None:
            self._socket.close()
        self._pid, self._socket = None, None


class _Watch:
    """The patience with another process for one answer, which starts now.

    Its time on a processor decides, so that an outcome does not depend on what else the machine does. The limit on the
    wall-clock time is for a process that hangs without computing. Without a `pid` it is the only one.
    """

    def __init__(self, pid: int | None, max_seconds: float, max_wall_seconds: float) -> None:
        self._pid = pid
        self._most = max_seconds
        self._most_wall = max_wall_seconds
        self._used = self._processor_seconds()
        self._start = time.monotonic()

    def seconds(self) -> float:
        """How long to wait until the limits must be looked at again. Raises TimeoutError if one is exceeded."""
        left = self._most - (self._processor_seconds() - self._used)
        if left <= 0:
            raise TimeoutError(f"Decoding took more than {self._most:g} seconds of processor time.")
        wall = self._most_wall - (time.monotonic() - self._start)
        if wall <= 0:
            raise TimeoutError(f"Decoding did not end within {self._most_wall:g} seconds.")
        return min(wall, max(left, _LOOK_SECONDS))

    def _processor_seconds(self) -> float:
        """Processor time of the child process until now; 0 if it is dead, which its socket tells."""
        if self._pid is None:
            return 0.0
        try:
            return time.clock_gettime((~self._pid << 3) | _PROCESS_CLOCK)
        except OSError:
            return 0.0


class _Zygote:
    """The zygote process, from which all child processes of this process are forked; replaced after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def child(self) -> tuple[int, socket.socket]:
        """Fork a child process; returns its process id and the socket to it. Raises ItemError if that fails."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                control = self._control if self._process and self._process.poll() is None else self._start()
                ours, theirs = socket.socketpair()
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                try:
                    socket.send_fds(control, [b"c"], [theirs.fileno()])
                    (pid,) = _PID.unpack(_exactly(control, _PID.size, _Watch(None, _START_SECONDS, _START_SECONDS)))
                    return pid, ours
                except (EOFError, OSError):  # the zygote process died or, with TimeoutError (an OSError), hangs
                    ours.close()
                    self._end()
                finally:
                    theirs.close()
        raise ItemError("internal", "The decoder's zygote process does not start; the log of this process says why.")

    def _start(self) -> socket.socket:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            # By default, glibc maps and unmaps memory for each image, and the page faults take as long as the resizing.
            "MALLOC_MMAP_THRESHOLD_": "268435456",
            "MALLOC_TRIM_THRESHOLD_": "268435456",
            "MALLOC_TOP_PAD_": "16777216",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._end()  # the process before may have died, and its socket is still open
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from clipflow_ray.sandbox import run_zygote; run_zygote({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        return self._control

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._control.close()
            self._process = None


def run_zygote(descriptor: int) -> None:
    """Run the zygote process: fork a child process for each socket received through the control socket `descriptor`.

    Returns when the other end of the control socket is closed.
    """
    # These calls import all modules that a child process needs, because a child process can open no file.
    images.views(np.zeros((512, 512, 3), np.uint8), OPENAI_VIEW)
    Image.init()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the child processes, so no wait() is needed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the socket
    with socket.socket(fileno=descriptor) as control:
        while received := socket.recv_fds(control, 1, 1)[1]:
            pid = os.fork()
            if pid == 0:
                control.close()
                try:
                    _serve(socket.socket(fileno=received[0]))
                finally:
                    os._exit(0)  # at once: the clean-up belongs to the zygote process
            os.close(received[0])
            control.sendall(_PID.pack(pid))


def _serve(connection: socket.socket) -> None:
    """Main loop of a child process: answer requests until the socket is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff writes a line for each fault in a file
    memory = _MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # opens no further file, socket or pipe
    requests: queue.SimpleQueue[tuple[bytes, bytearray] | None] = queue.SimpleQueue()
    # A thread receives the next request while one is decoded, so the two sides cannot deadlock.
    threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()
    with suppress(ConnectionError):
        while request := requests.get():
            limits, spec = _settings(request[0])
            used = resource.getrusage(resource.RUSAGE_SELF)
            cpu = int(used.ru_utime + used.ru_stime + limits.max_seconds) + _CPU_SECONDS_BEYOND
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
            _send(connection, *_answer(bytes(request[1]), limits, spec))


def _listen(connection: socket.socket, requests: "queue.SimpleQueue[tuple[bytes, bytearray] | None]") -> None:
    with suppress(EOFError, ConnectionError):
        while True:
            requests.put(_receive(connection))
    requests.put(None)


@lru_cache(maxsize=1)
def _settings(request: bytes) -> tuple[ImageLimits, ViewSpec | None]:
    values = json.loads(request)
    return ImageLimits(**values["limits"]), values["view"] and ViewSpec(**values["view"])


def _answer(data: bytes, limits: ImageLimits, spec: ViewSpec | None) -> tuple[bytes, bytes | memoryview]:
    try:
        image = images.decode(data, limits)
    except ImageError as error:
        return json.dumps({"error_code": error.item_code, "message": str(error)}).encode(), b""
    rgb = np.ascontiguousarray(images.views(image.rgb, spec) if spec else image.rgb)
    facts = {name: value for name, value in vars(image).items() if name != "rgb"}
    return json.dumps(facts | {"shape": rgb.shape}).encode(), rgb.data.cast("B")


def _outcome(text: bytes, pixels: bytearray) -> DecodedImage | ImageError:
    answer = json.loads(text)
    if "error_code" in answer:
        return ImageError(answer["error_code"], answer["message"])
    return DecodedImage(rgb=np.frombuffer(pixels, np.uint8).reshape(answer.pop("shape")), **answer)


def _send(connection: socket.socket, message: bytes, payload: bytes | memoryview, watch: _Watch | None = None) -> None:
    """Send a message and a payload, framed by their bytes. Raises TimeoutError if `watch` has lost its patience."""
    with memoryview(payload).cast("B") as body:
        _all(connection, memoryview(_HEADER.pack(len(message), body.nbytes) + message), watch)
        _all(connection, body, watch)


def _all(connection: socket.socket, left: memoryview, watch: _Watch | None) -> None:
    while left:
        connection.settimeout(watch.seconds() if watch else None)
        with suppress(TimeoutError):
            left = left[connection.send(left) :]


def _receive(connection: socket.socket, watch: _Watch | None = None) -> tuple[bytes, bytearray]:
    """Message and payload of one `_send`. Raises EOFError if the socket is closed, TimeoutError as `_send` does."""
    length, size = _HEADER.unpack(_exactly(connection, _HEADER.size, watch))
    message = _exactly(connection, length, watch)
    return bytes(message), _exactly(connection, size, watch)


def _exactly(connection: socket.socket, count: int, watch: _Watch | None) -> bytearray:
    buffer = bytearray(count)
    left = memoryview(buffer)
    while left:
        connection.settimeout(watch.seconds() if watch else None)
        try:
            got = connection.recv_into(left)
        except TimeoutError:
            continue
        if got == 0:
            raise EOFError
        left = left[got:]
    return buffer


@lru_cache(maxsize=1)
def _zygote() -> _Zygote:
    return _Zygote()


@lru_cache(maxsize=1)
def _child() -> DecodeChild:
    return DecodeChild()
