"""`images.decode` in a child process that may die: a decoder that hangs or crashes costs one image, not the worker.

A thread that decodes cannot be stopped and a crash takes its process along, so untrusted bytes go through a socket to a
child with limits on time and memory that can open no file and no connection, and pixels come back. Children are forked
from one process that has imported all they need, so that a replacement is there at once. That process knows no secrets:
its environment holds nothing but what Python needs to start. Nothing is pickled on either side.
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

_HEADER: Final = struct.Struct(">IQ")  # bytes of json, bytes of payload
_BUFFER: Final = 2**20  # a view fits: a child does not wait until its answer is taken
_PID: Final = struct.Struct(">I")
_START_SECONDS: Final = 60.0
_ATTEMPTS: Final = 3
_WINDOW: Final = 2  # images that a child has at a time: one at work, one to go on with
_MEMORY: Final = 2 * 2**30
_CPU_SECONDS_BEYOND: Final = 2  # where the parent died and cannot stop the child, the kernel does


def decode(data: bytes, limits: ImageLimits, spec: ViewSpec | None = None) -> DecodedImage:
    """`images.decode` in this process's child; with `spec`, `rgb` is the encoder's view instead of all pixels.

    Raises ImageError as `images.decode` does, and with decode_timeout or decoder_crash.
    """
    return _child().decode(data, limits, spec)


def decode_all(
    contents: Sequence[bytes], limits: ImageLimits, spec: ViewSpec | None = None
) -> list[DecodedImage | ItemError]:
    """The same for several images, in their order; an error stands in its image's place instead of being raised.

    The next image is on its way to the child while one decodes.
    """
    return _child().decode_all(contents, limits, spec)


class DecodeChild:
    """One child; started when first needed, replaced when it was killed or died. Threads take turns."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
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
        request = json.dumps({"limits": limits.model_dump(), "view": spec and spec.model_dump()}).encode()
        outcomes: list[DecodedImage | ItemError] = []
        sent = attempts = 0
        with self._lock:
            while len(outcomes) < len(contents):
                try:
                    connection = self._socket or self._start()
                    connection.settimeout(limits.max_seconds)
                    for data in contents[sent : len(outcomes) + _WINDOW]:
                        _send(connection, request, data)
                        sent += 1
                    outcome: DecodedImage | ItemError = _outcome(
                        *_receive(connection, time.monotonic() + limits.max_seconds)
                    )
                except TimeoutError:
                    self._kill()
                    self._stop()
                    outcome = ImageError("decode_timeout", f"Decoding took more than {limits.max_seconds:g} seconds.")
                except (EOFError, ConnectionError):  # it died on the first image that it has not answered
                    self._stop()
                    sent, attempts = len(outcomes), attempts + 1
                    if attempts < _ATTEMPTS:
                        continue
                    outcome = ImageError("decoder_crash", f"The decoder crashed on this image {_ATTEMPTS} times.")
                except ItemError as error:  # no child can be started
                    outcome = error
                except BaseException:
                    self._stop()  # what it still answers would be taken for answers to the images of another call
                    raise
                outcomes.append(outcome)
                attempts = 0
                if self._socket is None:
                    sent = len(outcomes)
        return outcomes

    def close(self) -> None:
        """Stop the child; the next image starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> socket.socket:
        self._pid, self._socket = _nursery().child()
        return self._socket

    def _kill(self) -> None:
        """Only of a child that still holds its end: the id of one that has ended may be another process's by now."""
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _stop(self) -> None:
        """A child that waits for work ends with its socket."""
        if self._socket is not None:
            self._socket.close()
        self._pid, self._socket = None, None


class _Nursery:
    """The process that children are forked from, one for all children of this process; replaced when it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def child(self) -> tuple[int, socket.socket]:
        """Process id of a new child and the socket to talk to it."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                control = self._control if self._process and self._process.poll() is None else self._start()
                ours, theirs = socket.socketpair()
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                try:
                    socket.send_fds(control, [b"c"], [theirs.fileno()])
                    (pid,) = _PID.unpack(_exactly(control, _PID.size, time.monotonic() + _START_SECONDS))
                    return pid, ours
                except (EOFError, OSError):  # it died; TimeoutError is an OSError
                    ours.close()
                    self._end()
                finally:
                    theirs.close()
        raise ItemError("internal", "The decoder process does not start; its message is above.")

    def _start(self) -> socket.socket:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            # glibc would map and unmap memory for each image, and the page faults take as long as the resizing.
            "MALLOC_MMAP_THRESHOLD_": "268435456",
            "MALLOC_TRIM_THRESHOLD_": "268435456",
            "MALLOC_TOP_PAD_": "16777216",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from clipflow_ray.sandbox import nursery; nursery({theirs.fileno()})"],
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


def nursery(descriptor: int) -> None:
    """Fork a child for each socket that arrives through the control socket `descriptor`, until that one ends."""
    # All that children will need is imported here: they can open no file.
    images.view(np.zeros((2 * OPENAI_VIEW.size, 2 * OPENAI_VIEW.size, 3), np.uint8), OPENAI_VIEW)
    Image.init()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children: the kernel reaps them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with socket.socket(fileno=descriptor) as control:
        while received := socket.recv_fds(control, 1, 1)[1]:
            pid = os.fork()
            if pid == 0:
                control.close()
                try:
                    _serve(socket.socket(fileno=received[0]))
                finally:
                    os._exit(0)  # not through the parent's `finally`
            os.close(received[0])
            control.sendall(_PID.pack(pid))


def _serve(connection: socket.socket) -> None:
    """A child's loop: requests in, answers out, until the socket ends."""
    memory = _MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # no file, no socket, no pipe beyond what is open
    requests: queue.SimpleQueue[tuple[bytes, bytearray] | None] = queue.SimpleQueue()
    # The next request is taken in while one is at work: its sender never waits for a child that waits to be heard.
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
    rgb = np.ascontiguousarray(images.view(image.rgb, spec) if spec else image.rgb)
    facts = {name: value for name, value in vars(image).items() if name != "rgb"}
    return json.dumps(facts | {"shape": rgb.shape}).encode(), rgb.data.cast("B")


def _outcome(text: bytes, pixels: bytearray) -> DecodedImage | ImageError:
    answer = json.loads(text)
    if "error_code" in answer:
        return ImageError(answer["error_code"], answer["message"])
    return DecodedImage(rgb=np.frombuffer(pixels, np.uint8).reshape(answer.pop("shape")), **answer)


def _send(connection: socket.socket, message: bytes, payload: bytes | memoryview) -> None:
    connection.sendall(_HEADER.pack(len(message), len(payload)) + message)
    connection.sendall(payload)


def _receive(connection: socket.socket, deadline: float | None = None) -> tuple[bytes, bytearray]:
    """Message and payload of one `_send`."""
    length, size = _HEADER.unpack(_exactly(connection, _HEADER.size, deadline))
    message = _exactly(connection, length, deadline)
    return bytes(message), _exactly(connection, size, deadline)


def _exactly(connection: socket.socket, count: int, deadline: float | None) -> bytearray:
    buffer = bytearray(count)
    left = memoryview(buffer)
    while left:
        if deadline is not None:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
        got = connection.recv_into(left)
        if got == 0:
            raise EOFError
        left = left[got:]
    return buffer


@lru_cache(maxsize=1)
def _nursery() -> _Nursery:
    return _Nursery()


@lru_cache(maxsize=1)
def _child() -> DecodeChild:
    return DecodeChild()
