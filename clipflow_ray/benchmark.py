"""Speed as ratios of two things measured in one run, interleaved: the only performance figures this project quotes."""

import io
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import ray
import torch
from PIL import Image

from clipflow_ray import proxies
from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig, ProxyConfig, S3Options
from clipflow_ray.data import resources
from clipflow_ray.demo import photographs, s3_server
from clipflow_ray.images import VIEW_SIZE
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.storage import s3_client

_BUCKET: Final = "clipflow-benchmark"
_BATCH: Final = 32
_BARE_BATCHES: Final = 2
PROXIES_PER_SECOND: Final = 150.0


def audit_against_bare_encoder(objects: int, rounds: int) -> dict[str, Any]:
    """Whole audits from S3 against a bare loop encoder(batch) on ready tensors, with the same threads.

    An audit is timed as a user sees it: listing, actor start, reading, decoding, scoring, ledger; Ray itself is up.
    """
    config = AuditConfig(input=(), output="")
    encoder = Encoder(load_checkpoint(config.checkpoint).encoder)
    views = np.random.default_rng(0).integers(0, 256, (_BATCH, VIEW_SIZE, VIEW_SIZE, 3), np.uint8)
    with s3_server() as s3, tempfile.TemporaryDirectory() as folder:
        resources.connect()  # after the server: workers inherit the credentials that it sets
        torch.set_num_threads(resources.plan_scoring().encoder_cpus)
        source = _fill(s3, objects)

        def one_audit(at: int) -> float:
            start = time.perf_counter()
            audit(config.model_copy(update={"input": (source,), "output": os.path.join(folder, str(at)), "s3": s3}))
            return objects / (time.perf_counter() - start)

        def bare(_: int) -> float:
            start = time.perf_counter()
            for _ in range(_BARE_BATCHES):
                encoder.embed(views)
            return _BATCH * _BARE_BATCHES / (time.perf_counter() - start)

        bare(0)
        result = _interleaved("audit", one_audit, bare, rounds)
    ray.shutdown()
    return result | {"objects": objects}


def slowest_proxy_family(rounds: int) -> dict[str, Any]:
    """Proxies per second of the slowest family on one core, over the 150 that training asks of it."""
    torch.set_num_threads(1)
    config = ProxyConfig()
    view = np.random.default_rng(0).integers(0, 256, (VIEW_SIZE, VIEW_SIZE, 3), np.uint8)

    def rate(family: str) -> float:
        start, count = time.perf_counter(), 40
        for at in range(count):
            proxies.proxy(view, family, proxies.generator(0, family, at), config)
        return count / (time.perf_counter() - start)

    rates = {family: [rate(family) for _ in range(rounds)] for family in config.families}
    slowest = min(rates, key=lambda family: float(np.median(rates[family])))
    ratios = np.array(rates[slowest]) / PROXIES_PER_SECOND
    return {
        "name": "proxies",
        "ratio": float(np.median(ratios)),
        "rates": {"slowest_family": float(np.median(rates[slowest])), "required": PROXIES_PER_SECOND},
        "family": slowest,
        "n": rounds,
        "spread": [float(ratios.min()), float(ratios.max())],
    }


def _interleaved(
    name: str, ours: Callable[[int], float], theirs: Callable[[int], float], rounds: int
) -> dict[str, Any]:
    """Alternate two rates; each round's ratio uses the mean of the bare rates right before and after it."""
    before, ratios, rates = theirs(0), [], []
    for at in range(rounds):
        own, after = ours(at), theirs(at)
        rates.append((own, 0.5 * (before + after)))
        ratios.append(own / rates[-1][1])
        before = after
    return {
        "name": name,
        "ratio": float(np.median(ratios)),
        "rates": {name: float(np.median([a for a, _ in rates])), "bare": float(np.median([b for _, b in rates]))},
        "n": rounds,
        "spread": [float(min(ratios)), float(max(ratios))],
    }


def _fill(s3: S3Options, objects: int) -> str:
    """JPEGs of 640 x 480 cut from the demo's photographs."""
    client = s3_client(s3)
    client.create_bucket(Bucket=_BUCKET)
    photos = [Image.fromarray(photo).resize((1280, 960)) for _, photo in photographs()]
    rng = np.random.default_rng(0)
    for at in range(objects):
        left, top = int(rng.integers(640)), int(rng.integers(480))
        out = io.BytesIO()
        photos[at % len(photos)].crop((left, top, left + 640, top + 480)).save(out, "JPEG", quality=90)
        client.put_object(Bucket=_BUCKET, Key=f"images/{at:06d}.jpg", Body=out.getvalue())
    return f"s3://{_BUCKET}/images/"
