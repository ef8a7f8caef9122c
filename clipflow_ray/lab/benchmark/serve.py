"""The saturated endpoint over a bare encoder loop, and the time that HTTP adds to one image."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from pydantic import Field

from clipflow_ray.client import Client
from clipflow_ray.config import TEST_TOWER, EncoderConfig, ServeConfig
from clipflow_ray.data import resources
from clipflow_ray.lab.benchmark.common import BATCH, Benchmark, bare_loop, interleaved, jpegs, untrained
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.serve.edge import nginx_path
from clipflow_ray.serve.launch import endpoint
from clipflow_ray.serve.upstreams import upstreams

_100_KB: Final = (1024, 768)  # pixels of a JPEG of that size, as `jpegs` makes it
_CLIENTS: Final = 4
_PORT: Final = 8100


class ServeBenchmark(Benchmark):
    """The saturated endpoint over a bare encoder loop."""

    images: int = Field(description="Images of one round.")
    added_ms: dict[str, float] = Field(
        description="Milliseconds that each route to the detector adds to the median time of one image."
    )


def serving(images: int, rounds: int) -> ServeBenchmark:
    """Images per second of a saturated endpoint with real weights over a bare encoder loop on the same cores.

    `added_ms` is the median time of one image of 100 kB minus that of `Detector.detect`, with the test tower: for a
    request to a Serve replica (`serve`) and for one through the edge (`edge`).
    """
    contents = list(jpegs(images))
    checkpoint = load_checkpoint(ServeConfig().checkpoint)
    bare = bare_loop(Encoder(checkpoint.encoder, checkpoint.segments))
    torch.set_num_threads(resources.cores())
    with endpoint(ServeConfig(), "127.0.0.1", _PORT) as url, ThreadPoolExecutor(_CLIENTS) as clients:

        def served(_: int) -> float:
            start = time.perf_counter()
            requests = [contents[at : at + BATCH] for at in range(0, images, BATCH)]
            for answer in clients.map(lambda request: Client(url).detect(request), requests):
                assert all(result.status == "ok" for result in answer.results)
            return images / (time.perf_counter() - start)

        served(0)
        bare(0)
        result = interleaved("serve", served, bare, rounds)
    added = _added_latency(list(jpegs(BATCH, _100_KB)), rounds)
    return ServeBenchmark(**dict(result), images=images, added_ms=added)


def _added_latency(contents: list[bytes], rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = untrained(EncoderConfig(model=TEST_TOWER, pretrained="seed:0"), os.path.join(folder, "checkpoint"))
        detector = Detector.from_checkpoint(checkpoint)
        config = ServeConfig(checkpoint=checkpoint, alpha=0.1)
        with endpoint(config, "127.0.0.1", _PORT) as url, Client(url) as edge:
            ways: dict[str, Callable[[bytes], object]] = {
                "direct": lambda data: detector.detect(data, 0.1),
                "edge": lambda data: edge.detect([data]),
            }
            if nginx_path():
                replica = upstreams(f"127.0.0.1:{_PORT + 1}")[0]
                through_serve = Client(f"http://{replica}")
                ways["serve"] = lambda data: through_serve.detect([data])
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for at in range(rounds + 1):  # the first round is a warm-up
                for name, way in ways.items():
                    for data in contents:
                        start = time.perf_counter()
                        way(data)
                        if at:
                            seconds[name].append(time.perf_counter() - start)
    direct = float(np.median(seconds.pop("direct")))
    return {name: 1000.0 * (float(np.median(each)) - direct) for name, each in seconds.items()}
