"""Decoders of a server: a fixed number of child processes that can be killed, each driven by a thread of its own."""

import asyncio
import hashlib
import queue
import time
from concurrent.futures import ThreadPoolExecutor

from clipflow_ray.config import ImageLimits, ViewSpec
from clipflow_ray.errors import ItemError
from clipflow_ray.images import DecodedImage
from clipflow_ray.sandbox import DecodeChild
from clipflow_ray.serve.metrics import IngressMetrics
from clipflow_ray.serve.probe import probe_png


class DecoderPool:
    """`size` child processes, all started by the constructor."""

    def __init__(self, size: int, metrics: IngressMetrics) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[DecodeChild] = queue.SimpleQueue()
        children = [DecodeChild() for _ in range(size)]
        list(self._threads.map(lambda child: child.decode(probe_png(), ImageLimits()), children))
        for child in children:
            self._idle.put(child)

    async def decode(self, data: bytes, limits: ImageLimits, spec: ViewSpec) -> tuple[str, DecodedImage | ItemError]:
        """sha256 of `data`, and the decoded image with its view in `rgb`, or the reason why there is none."""
        arrived = time.monotonic()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._decode, data, limits, spec, arrived)

    def close(self) -> None:
        """Stop the children. Images that wait for a decoder are given up."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()

    def _decode(
        self, data: bytes, limits: ImageLimits, spec: ViewSpec, arrived: float
    ) -> tuple[str, DecodedImage | ItemError]:
        start = time.monotonic()
        self._metrics.decode_wait.observe(max(start - arrived, 1e-6))
        child = self._idle.get()
        try:
            return hashlib.sha256(data).hexdigest(), child.decode(data, limits, spec)
        except ItemError as error:
            return hashlib.sha256(data).hexdigest(), error
        finally:
            self._idle.put(child)
            self._metrics.decode.observe(time.monotonic() - start)
