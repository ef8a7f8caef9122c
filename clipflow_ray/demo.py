"""A first audit that needs no data: sample photographs of installed packages, in an embedded S3 server.

The server is moto's, in its own process on a free loopback port. The bucket holds each photograph as it is, several
crops of it at native resolution, a copy of each crop with a strong spectral edit, and a few broken files.
"""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from clipflow_ray import proxies
from clipflow_ray.config import ProxyConfig
from clipflow_ray.errors import ClipflowError
from clipflow_ray.images import Pixels
from clipflow_ray.place import Place

BUCKET: Final = "clipflow-demo"
_CROP: Final = 384
_CROPS: Final = 2
_START_SECONDS: Final = 60
# Far stronger than in training, so that the edited crops stand out.
_STRONG: Final[dict[str, dict[str, tuple[float, ...]]]] = {
    "radial_gain_up": {"start": (0.1, 0.15), "log_gain": (2.2, 2.6)},
    "phase_jitter": {"start": (0.1, 0.2), "sigma": (1.2, 1.5)},
    "replicas": {"factors": (4.0,), "mix": (0.9, 1.0)},
}


@contextmanager
def s3_server() -> Iterator[Place]:
    """Run a moto S3 server process on a free loopback port, and yield the place of an empty bucket in it.

    The server ends with the context. Sets dummy credentials in this process's environment. Raises ClipflowError if the
    server does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(server, port)
        os.environ |= {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo"}
        yield Place.new_bucket(BUCKET, f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait(10)


def fill_bucket(bucket: Place) -> str:
    """Write the demo's objects; returns the URI of their prefix."""
    images = bucket / "images/"
    for key, data in objects():
        (images / key).write(data)
    return images.uri


def objects() -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of every demo object; the same in every run."""
    config = ProxyConfig(families=_STRONG)
    names = sorted(_STRONG)
    first = b""
    for number, (name, photo) in enumerate(photographs()):
        data = _jpeg(photo)
        first = first or data
        yield f"photographs/{name}.jpg", data
        rng = proxies.generator(0, name)
        size = min(_CROP, *photo.shape[:2])
        for crop in range(_CROPS):
            top, left = (int(rng.integers(side - size + 1)) for side in photo.shape[:2])
            square = np.ascontiguousarray(photo[top : top + size, left : left + size])
            yield f"crops/{name}-{crop}.png", _png(square)
            twin = proxies.proxy(square, names[(number + crop) % len(names)], rng, config)
            yield f"edited/{name}-{crop}.png", _png(twin)
    yield "broken/truncated.jpg", first[: len(first) // 2]
    yield "broken/empty.png", b""
    yield "broken/text.jpg", b"This is a note, not a photograph.\n"


def photographs() -> Iterator[tuple[str, Pixels]]:
    """(name, uint8 [H, W, 3]) of the photographs in scikit-image, scikit-learn and matplotlib."""
    import matplotlib
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    for name in (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
    ):
        yield name.rsplit(".", 1)[0], np.asarray(Image.open(folder / name).convert("RGB"))
    samples = load_sample_images()
    for path, photo in zip(samples.filenames, samples.images, strict=True):
        yield Path(path).stem, photo
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    yield "grace_hopper", np.asarray(Image.open(hopper).convert("RGB"))


def _wait_for(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ClipflowError("The embedded S3 server did not start; install the `demo` extra (moto[server]).")


def _jpeg(photo: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(photo).save(out, "JPEG", quality=92)
    return out.getvalue()


def _png(photo: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(photo).save(out, "PNG")
    return out.getvalue()
