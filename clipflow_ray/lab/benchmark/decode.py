"""Decoding large JPEGs to the encoder's views in the sandbox over a plain loop of Pillow."""

import io
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from clipflow_ray import images, sandbox
from clipflow_ray.config import DEFAULT_CHECKPOINT, ImageLimits, ViewSpec
from clipflow_ray.demo import photographs
from clipflow_ray.lab.benchmark.common import Benchmark, interleaved
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector

_SIZES: Final = {"108": (12_000, 9_000), "24": (6_000, 4_000)}  # megapixels: width, height


class DecodeBenchmark(Benchmark):
    """Sandboxed decoding over Pillow's decoding and resizing, for a JPEG of 108 megapixels."""

    ratio_24: float = Field(description="The same ratio for a JPEG of 24 megapixels, which is decoded in full.")
    score_difference: float = Field(description="Score at the reduced scale minus that in full, absolute.")
    score_difference_95: float = Field(description="Score after re-encoding at quality 95 minus that before, absolute.")


def decoding_large_jpegs(rounds: int) -> DecodeBenchmark:
    """Views of a large JPEG by the sandbox over `Image.open`, `convert` and a bicubic `resize` for each size of view.

    One thread, one image at a time. The scores are those of the packaged checkpoint for the image of 108 megapixels.
    """
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None
    data = {name: _jpeg(size) for name, size in _SIZES.items()}

    def compared(content: bytes) -> Benchmark:
        ours = _rate(lambda: sandbox.decode(content, ImageLimits(), checkpoint.view))
        ours(0)
        return interleaved("decode", ours, _rate(lambda: _plain(content, checkpoint.view)), rounds)

    large, small = compared(data["108"]), compared(data["24"])
    scores = _scores(data["108"], Detector(checkpoint))
    return DecodeBenchmark(
        **dict(large),
        ratio_24=small.ratio,
        score_difference=abs(scores["reduced"] - scores["full"]),
        score_difference_95=abs(scores["again"] - scores["full"]),
    )


def _scores(data: bytes, detector: Detector) -> dict[str, float]:
    """The score of a JPEG at a reduced scale, in full, and in full after re-encoding at quality 95."""
    limits, view = ImageLimits(), detector.checkpoint.view
    again = io.BytesIO()
    Image.open(io.BytesIO(data)).save(again, "JPEG", quality=95)
    views = {"reduced": sandbox.decode(data, limits, view).rgb}
    for name, content in (("full", data), ("again", again.getvalue())):
        views[name] = images.views(sandbox.decode(content, limits).rgb, view)
    return {name: float(detector.score_views([each]).score[0]) for name, each in views.items()}


def _plain(data: bytes, spec: ViewSpec) -> None:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for size in spec.sizes:
        short = min(image.size)
        width, height = (size * side // short for side in image.size)
        np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _jpeg(size: tuple[int, int]) -> bytes:
    """A JPEG of `size` (width, height): a photograph of the demo, enlarged, with the noise of a sensor."""
    _, rgb = next(iter(photographs()))
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
