"""`images.decode` in a child process that may die: a decoder that hangs or crashes costs one image, not the worker.

A thread that decodes cannot be stopped and a crash takes its process along, so untrusted bytes go through a pipe to a
child with limits on time, memory and files, and pixels come back. The child knows no secrets: its environment holds
nothing but what Python needs to start. Nothing is pickled on either side.
"""

import io
import json
import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, BinaryIO, Final

import numpy as np

from clipflow_ray import images
from clipflow_ray.config import ImageLimits
from clipflow_ray.errors import ImageError, ItemError
from clipflow_ray.images import DecodedImage, ViewKind

_HEADER: Final = struct.Struct(">IQ")  # bytes of json, bytes of payload
_START_SECONDS: Final = 60.0
_ATTEMPTS: Final = 3
_MEMORY: Final = 2 * 2**30
_CPU_SECONDS_BEYOND: Final = 2  # where the parent died and cannot stop the child, the kernel does


def decode(data: bytes, limits: ImageLimits, kind: ViewKind | None = None) -> DecodedImage:
    """`images.decode` in this process's child; with `kind`, `rgb` is the encoder's view instead of all pixels.

    Raises ImageError as `images.decode` does, and with decode_timeout or decoder_crash.
    """
    return _child().decode(data, limits, kind)


class DecodeChild:
    """One child; started when first needed, replaced when it was killed or died. Threads take turns."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        return self._process.pid if self._process else None

    def decode(self, data: bytes, limits: ImageLimits, kind: ViewKind | None = None) -> DecodedImage:
        """See the module's `decode`."""
        request = {"limits": limits.model_dump(), "kind": kind}
        with self._lock:
            for _ in range(_ATTEMPTS):
                process = self._process or self._start()
                try:
                    _send(_pipe(process.stdin), request, data)
                    answer, payload = _receive(_pipe(process.stdout), time.monotonic() + limits.max_seconds)
                except TimeoutError as error:
                    self._stop()
                    message = f"Decoding took more than {limits.max_seconds:g} seconds."
                    raise ImageError("decode_timeout", message) from error
                except (EOFError, BrokenPipeError):
                    self._stop()
                    continue
                if "error_code" in answer:
                    raise ImageError(answer["error_code"], answer["message"])
                rgb = np.frombuffer(payload, np.uint8).reshape(answer.pop("shape"))
                return DecodedImage(rgb=rgb, **answer)
        raise ImageError("decoder_crash", f"The decoder crashed on this image {_ATTEMPTS} times.")

    def close(self) -> None:
        """Stop the child; the next image starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", "from clipflow_ray.sandbox import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        try:
            _receive(_pipe(process.stdout), time.monotonic() + _START_SECONDS)
        except (EOFError, TimeoutError) as error:
            self._stop()
            raise ItemError("internal", "The decoder process does not start; its message is above.") from error
        return process

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve() -> None:
    """The child's loop: requests on stdin, answers on stdout, until stdin ends."""
    stdin, stdout = io.FileIO(0), io.FileIO(1, "w")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(stdout, {}, b"")
    while True:
        try:
            request, data = _receive(stdin)
        except EOFError:
            return
        limits = ImageLimits(**request["limits"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = int(used.ru_utime + used.ru_stime + limits.max_seconds) + _CPU_SECONDS_BEYOND
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
        answer, payload = _answer(bytes(data), limits, request["kind"])
        _send(stdout, answer, payload)


def _answer(data: bytes, limits: ImageLimits, kind: ViewKind | None) -> tuple[dict[str, Any], bytes | memoryview]:
    try:
        image = images.decode(data, limits)
    except ImageError as error:
        return {"error_code": error.item_code, "message": str(error)}, b""
    rgb = np.ascontiguousarray(images.view(image.rgb, kind) if kind else image.rgb)
    facts = asdict(replace(image, rgb=np.empty(0, np.uint8)))
    del facts["rgb"]
    return facts | {"shape": rgb.shape}, rgb.data.cast("B")


def _send(pipe: BinaryIO, message: dict[str, Any], payload: bytes | memoryview) -> None:
    text = json.dumps(message).encode()
    for part in (_HEADER.pack(len(text), len(payload)) + text, payload):
        left = memoryview(part)
        while left:
            left = left[pipe.write(left) :]


def _receive(pipe: BinaryIO, deadline: float | None = None) -> tuple[dict[str, Any], bytearray]:
    length, size = _HEADER.unpack(_exactly(pipe, _HEADER.size, deadline))
    message = json.loads(_exactly(pipe, length, deadline))
    return message, _exactly(pipe, size, deadline)


def _exactly(pipe: BinaryIO, count: int, deadline: float | None) -> bytearray:
    buffer = bytearray(count)
    left, poll = memoryview(buffer), select.poll()
    poll.register(pipe, select.POLLIN)
    while left:
        if deadline is not None and not poll.poll(max(0.0, deadline - time.monotonic()) * 1000.0):
            raise TimeoutError
        got = os.readv(pipe.fileno(), [left])
        if got == 0:
            raise EOFError
        left = left[got:]
    return buffer


def _pipe(pipe: Any) -> BinaryIO:
    assert pipe is not None
    result: BinaryIO = pipe
    return result


@lru_cache(maxsize=1)
def _child() -> DecodeChild:
    return DecodeChild()
