"""Decoding large JPEGs to the encoder's views in the sandbox over a plain loop of Pillow."""

import io
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from clipflow_ray import sandbox
from clipflow_ray.config import DEFAULT_CHECKPOINT, ImageLimits, ViewSpec
from clipflow_ray.demo import photographs
from clipflow_ray.images import Pixels
from clipflow_ray.lab.benchmark.common import Benchmark, interleaved
from clipflow_ray.model.checkpoint import load_checkpoint

_SIZES: Final = {"108": (12_000, 9_000), "24": (6_000, 4_000)}  # megapixels: width, height


class DecodeBenchmark(Benchmark):
    """Sandboxed decoding over Pillow's decoding and resizing, for a JPEG of 108 megapixels."""

    ratio_24: float = Field(description="The same ratio for a JPEG of 24 megapixels.")


def decoding_large_jpegs(rounds: int) -> DecodeBenchmark:
    """Views of a large JPEG by the sandbox over `Image.open`, `convert` and a bicubic `resize` for each size of view.

    One thread, one image at a time.
    """
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None
    _, photo = next(iter(photographs()))
    data = {name: _jpeg(photo, size) for name, size in _SIZES.items()}

    def compared(content: bytes) -> Benchmark:
        ours = _rate(lambda: sandbox.decode(content, ImageLimits(), checkpoint.view))
        ours(0)
        return interleaved("decode", ours, _rate(lambda: _plain(content, checkpoint.view)), rounds)

    large, small = compared(data["108"]), compared(data["24"])
    return DecodeBenchmark(**dict(large), ratio_24=small.ratio)


def _plain(data: bytes, spec: ViewSpec) -> None:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for size in spec.sizes:
        short = min(image.size)
        width, height = (size * side // short for side in image.size)
        np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _jpeg(rgb: Pixels, size: tuple[int, int]) -> bytes:
    """A JPEG of `size` (width, height): a photograph enlarged, with the noise of a sensor."""
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    enlarged = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = enlarged + rng.integers(-6, 7, enlarged.shape, dtype=np.int16)
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def _rate(decode: Callable[[], object]) -> Callable[[int], float]:
    def measured(_: int) -> float:
        start = time.perf_counter()
        decode()
        return 1.0 / (time.perf_counter() - start)

    return measured
