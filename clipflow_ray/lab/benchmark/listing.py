"""Listing rate of a long list over that of a list of an eighth of its length, and the driver's peak memory."""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
from pydantic import Field

from clipflow_ray.data import resources
from clipflow_ray.inputs.manifest import write_manifest
from clipflow_ray.lab.benchmark.common import Benchmark, interleaved
from clipflow_ray.place import Place


class ListingBenchmark(Benchmark):
    """Listing rate of a long list over that of a list of an eighth of its length."""

    keys: int = Field(description="Keys of the long list.")
    driver_peak_mib: int = Field(description="Peak memory of this process, in MiB.")


def listing(keys: int, rounds: int) -> ListingBenchmark:
    """Keys per second from a list file into a manifest, over those of a list of an eighth of its length.

    A ratio of 1 means that the time grows linearly with the number of keys.
    """
    resources.connect()
    with tempfile.TemporaryDirectory() as folder:

        def rate(count: int) -> Callable[[int], float]:
            path = Path(folder, f"{count}.txt")
            path.write_text("".join(f"s3://bucket/images/{at // 1000:05d}/{at:09d}.jpg\n" for at in range(count)))

            def measured(_: int) -> float:
                start = time.perf_counter()
                write_manifest([Place.at(path)], Place.at(tempfile.mkdtemp(dir=folder)))
                return count / (time.perf_counter() - start)

            return measured

        whole, eighth = rate(keys), rate(keys // 8)
        eighth(0)
        result = interleaved("listing", whole, eighth, rounds)
    ray.shutdown()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ListingBenchmark(**dict(result), keys=keys, driver_peak_mib=peak // 1024)
