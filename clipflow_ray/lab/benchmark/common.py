"""Shared parts of the benchmarks: the model of a result, interleaved timing, images, an untrained checkpoint."""

import io
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from clipflow_ray import images
from clipflow_ray.config import Closed, EncoderConfig, FlowConfig, ImageLimits
from clipflow_ray.demo import photographs
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint, save_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.extractor import joined
from clipflow_ray.model.flow import Flow

BATCH: Final = 32


class Benchmark(Closed):
    """A ratio of two rates that were measured in turns."""

    name: str = Field(description="Name of the benchmark.")
    ratio: float = Field(description="Median ratio of the two rates over the rounds.")
    rates: dict[str, float] = Field(description="Median of each rate, per second.")
    n: int = Field(description="Number of rounds.")
    spread: tuple[float, float] = Field(description="Lowest and highest ratio.")


def interleaved(name: str, ours: Callable[[int], float], theirs: Callable[[int], float], rounds: int) -> Benchmark:
    """Measure two rates in turns. Each round divides `ours` by the mean of `theirs` right before and after it."""
    before, ratios, rates = theirs(0), [], []
    for at in range(rounds):
        own, after = ours(at), theirs(at)
        rates.append((own, 0.5 * (before + after)))
        ratios.append(own / rates[-1][1])
        before = after
    return Benchmark(
        name=name,
        ratio=float(np.median(ratios)),
        rates={name: float(np.median([a for a, _ in rates])), "bare": float(np.median([b for _, b in rates]))},
        n=rounds,
        spread=(min(ratios), max(ratios)),
    )


def bare_loop(encoder: Encoder, batch: int = BATCH, batches: int = 2) -> Callable[[int], float]:
    """Return a measurement of the reference rate: images per second of a loop `encoder(batch)` on ready views."""
    views = np.random.default_rng(0).integers(0, 256, (batch, encoder.view.bytes), np.uint8)

    def bare(_: int) -> float:
        start = time.perf_counter()
        for _ in range(batches):
            encoder(views)
        return batch * batches / (time.perf_counter() - start)

    return bare


def untrained(encoder: EncoderConfig, path: str) -> str:
    """Write a checkpoint with an untrained flow to `path` and return `path`. It is as fast as a trained one."""
    tower, limits = Encoder(encoder, device="cpu"), ImageLimits()
    views = np.stack([images.views(images.decode(data, limits).rgb, tower.view) for data in jpegs(BATCH)])
    embeddings = torch.from_numpy(joined(tower(views), tower.segments))
    flow = Flow((embeddings.shape[1],), FlowConfig())
    flow.fit_standardizer(embeddings)
    checkpoint = Checkpoint(
        encoder=encoder,
        encoder_fingerprint=tower.fingerprint,
        view=tower.view,
        segments=tower.segments,
        widths=flow.segments,
        flow_config=FlowConfig(),
        flow_state=flow.state_dict(),
        calibration=Calibration.fit(np.linspace(0.0, 1.0, 200, dtype=np.float32), ["jpeg|0-512"] * 200),
    )
    save_checkpoint(checkpoint, path)
    return path


def jpegs(count: int, size: tuple[int, int] = (640, 480)) -> Iterator[bytes]:
    """Yield JPEGs of `size` (width, height), cut from the demo's photographs at twice that size."""
    width, height = size
    photos = [Image.fromarray(photo).resize((2 * width, 2 * height)) for _, photo in photographs()]
    rng = np.random.default_rng(0)
    for at in range(count):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        out = io.BytesIO()
        photos[at % len(photos)].crop((left, top, left + width, top + height)).save(out, "JPEG", quality=90)
        yield out.getvalue()
