"""The slowest proxy family on one core over the rate that training requires."""

import time
from typing import Final

import numpy as np
import torch
from pydantic import Field

from clipflow_ray import proxies
from clipflow_ray.config import Closed, ProxyConfig
from clipflow_ray.lab.benchmark.common import Benchmark

PER_SECOND: Final = 150.0


class SlowestFamily(Closed):
    """The slowest family at one size of the view."""

    family: str = Field(description="Name of the family.")
    rate: float = Field(description="Its proxies per second.")


class ProxiesBenchmark(Benchmark):
    """The slowest proxy family over the required rate."""

    family: str = Field(description="The slowest family.")
    larger_views: dict[int, SlowestFamily] = Field(description="The slowest family by pixels of larger views.")


def slowest_proxy_family(rounds: int) -> ProxiesBenchmark:
    """Proxies per second of the slowest family on one core, over the 150 that training needs at 224 pixels.

    `larger_views` has the slowest family and its rate for larger sizes of the view.
    """
    torch.set_num_threads(1)
    config = ProxyConfig()

    def slowest_at(size: int, count: int) -> tuple[str, list[float]]:
        view = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)

        def rate(family: str) -> float:
            start = time.perf_counter()
            for at in range(count):
                proxies.proxy(view, family, proxies.generator(0, family, at), config)
            return count / (time.perf_counter() - start)

        rates = {family: [rate(family) for _ in range(rounds)] for family in config.families}
        return min(rates.items(), key=lambda item: float(np.median(item[1])))

    slowest, rates = slowest_at(224, 40)
    larger = {size: slowest_at(size, 10) for size in (336, 448)}
    ratios = np.array(rates) / PER_SECOND
    return ProxiesBenchmark(
        name="proxies",
        ratio=float(np.median(ratios)),
        rates={"slowest_family": float(np.median(rates)), "required": PER_SECOND},
        family=slowest,
        n=rounds,
        spread=(float(ratios.min()), float(ratios.max())),
        larger_views={
            size: SlowestFamily(family=name, rate=float(np.median(each))) for size, (name, each) in larger.items()
        },
    )
