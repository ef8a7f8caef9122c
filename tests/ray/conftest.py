"""One small embedded Ray cluster and one small trained checkpoint for the whole session."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from clipflow_ray.config import (
    TEST_TOWER,
    EncoderConfig,
    FitConfig,
    FlowConfig,
    ProxyConfig,
    Segment,
    SplitConfig,
    TrainConfig,
)
from clipflow_ray.data import resources
from clipflow_ray.demo import s3_server
from clipflow_ray.place import Place
from clipflow_ray.serve.launch import SWITCHES

FAMILIES = ("low_pass", "radial_gain_down", "resample", "tone")
# Encoded besides the trained segment, for a candidate of the experiments. Small views are quick.
EXTRA = (Segment(feature="block1.mean", size=64, training="paired"),)


@pytest.fixture(scope="session")
def cluster(s3: Place) -> Iterator[None]:
    """A Ray cluster. It starts after the S3 server, so that its workers inherit the credentials.

    The environment is that of `clipflow-ray serve`."""
    os.environ.update(SWITCHES)
    # Two processes test at a time, each with its own cluster. The replicas of both need ports of this machine.
    first = 30000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(first)
    os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(first + 499)
    with open(Path(tempfile.gettempdir()) / "clipflow-ray-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Ray gives up if a cluster takes 30 seconds to start, so one starts at a time
        resources.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[Place]:
    """A bucket behind a real S3 protocol: moto's server in its own process, on a free loopback port."""
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def tiny(naturals: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A training that takes seconds: the test tower, a small flow, six sources."""
    families = ProxyConfig().families
    return TrainConfig(
        input=(str(naturals),),
        output=str(tmp_path_factory.mktemp("train")),
        encoder=EncoderConfig(model=TEST_TOWER, pretrained="seed:0"),
        segments=(Segment(feature="projected", size=224),),
        extra_segments=EXTRA,
        # An image draws its families by its path. With few families, "alpine" draws the held-out one.
        proxies=ProxyConfig(natural_views=2, proxies_per_view=1, families={name: families[name] for name in FAMILIES}),
        flow=FlowConfig(blocks=3, hidden=32),
        fit=FitConfig(epochs=3, batch_size=32, learning_rate=2e-3),
        split=SplitConfig(validation=("alpine",), calibration=("harbour", "studio"), held_out_family="low_pass"),
    )


@pytest.fixture(scope="session")
def trained(cluster: None, tiny: TrainConfig) -> str:
    """The path of the tiny checkpoint."""
    from clipflow_ray.train.run import train

    return train(tiny).checkpoint
