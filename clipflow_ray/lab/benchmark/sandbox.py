"""Decoding in the sandbox's child process over decoding in the calling process."""

import time
from collections.abc import Callable

import torch
from pydantic import Field

from clipflow_ray import images, sandbox
from clipflow_ray.config import DEFAULT_CHECKPOINT, ImageLimits
from clipflow_ray.lab.benchmark.common import BATCH, Benchmark, interleaved, jpegs
from clipflow_ray.model.checkpoint import load_checkpoint


class SandboxBenchmark(Benchmark):
    """Sandboxed decoding over decoding in the calling process, for photographs of two megapixels."""

    ratio_small: float = Field(description="The same ratio for photographs of 640 x 480 pixels.")


def sandboxed_decoding(rounds: int) -> SandboxBenchmark:
    """Decoding to the encoder's view in one child process over the same in this process, on one thread.

    `ratio` is for photographs of two megapixels, `ratio_small` for the 640 x 480 pixels of the other benchmarks.
    """
    limits, spec = ImageLimits(), load_checkpoint(DEFAULT_CHECKPOINT).view
    torch.set_num_threads(1)

    def compared(contents: list[bytes]) -> Benchmark:
        def rate(decode: Callable[[], object]) -> Callable[[int], float]:
            def measured(_: int) -> float:
                start = time.perf_counter()
                decode()
                return len(contents) / (time.perf_counter() - start)

            return measured

        child = rate(lambda: sandbox.decode_all(contents, limits, spec))
        here = rate(lambda: [images.views(images.decode(data, limits).rgb, spec) for data in contents])
        child(0)
        return interleaved("sandbox", child, here, rounds)

    small = compared(list(jpegs(BATCH)))
    large = compared(list(jpegs(BATCH, (1600, 1200))))
    return SandboxBenchmark(**dict(large), ratio_small=small.ratio)
