"""Helpers and fixtures for all tests, such as synthetic photo-like images."""

import io
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from PIL import Image

from clipflow_ray.images import Pixels
from clipflow_ray.place import Place

SOURCES = ("alpine", "harbour", "kitchen", "market", "meadow", "studio")


def photo(seed: int, size: tuple[int, int] = (256, 256)) -> Pixels:
    """Coloured 1/f noise, uint8 [H, W, 3]: synthetic, with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    height, width = size
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    radius[0, 0] = 1.0
    amplitude = radius ** -rng.uniform(0.9, 1.3)
    planes = [np.fft.ifft2(amplitude * np.fft.fft2(rng.standard_normal(size))).real for _ in range(2)]
    tint = rng.uniform(0.2, 1.0, size=(3, 2))
    stacked = np.stack([tint[c, 0] * planes[0] + tint[c, 1] * planes[1] for c in range(3)], axis=2)
    stacked = stacked / stacked.std() * rng.uniform(25, 45) + rng.uniform(100, 150, size=3)
    image: Pixels = np.clip(stacked, 0, 255).astype(np.uint8)
    return image


def encoded(rgb: Pixels, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, kind, **options)
    return out.getvalue()


def s3_client(place: Place) -> Any:
    """boto3's own client for the server of `place`, so that tests check our code against another program."""
    return boto3.client("s3", endpoint_url=place.options.endpoint_url, region_name=place.options.region)


def scan_bomb() -> bytes:
    """A small progressive JPEG of 36 megapixels that takes minutes to decode: its last scan is repeated 2,000 times."""
    flat = encoded(np.full((6000, 6000, 3), 90, np.uint8), quality=60, progressive=True)
    last = flat.rindex(b"\xff\xda")
    return flat[:last] + flat[last:-2] * 2000 + flat[-2:]


@pytest.fixture(scope="session")
def naturals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 6 sources with 16 photo-like images each, JPEG of several sizes and qualities."""
    root = tmp_path_factory.mktemp("naturals")
    for number, source in enumerate(SOURCES):
        (root / source).mkdir()
        for at in range(16):
            size = (240 + 16 * (at % 3), 256 + 32 * number)
            data = encoded(photo(100 * number + at, size), quality=70 + 4 * number)
            (root / source / f"{at:03d}.jpg").write_bytes(data)
    return root
