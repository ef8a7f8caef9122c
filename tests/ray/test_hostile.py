"""Hostile images and requests through the edge: each is refused in time, memory does not grow and no process dies."""

import io
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image

from clipflow_ray.errors import ITEM_CODES
from clipflow_ray.serve.edge import nginx_path
from clipflow_ray.serve.schemas import DetectResponse
from tests.conftest import photo
from tests.ray.site import Site, whole_site

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(nginx_path() is None, reason="no nginx: install Debian's `nginx` to test the edge"),
]

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
SLOWEST_SECONDS = 2.5
GROWTH = 64 * 2**20
PER_REQUEST = 32


@pytest.fixture(scope="module")
def site(trained: str) -> Iterator[Site]:
    with whole_site(trained) as site:
        yield site


def seeds() -> list[bytes]:
    found = []
    for number, kind in enumerate(KINDS):
        for size in ((40, 56), (96, 80)):
            out = io.BytesIO()
            Image.fromarray(photo(number, size)).save(out, kind)
            found.append(out.getvalue())
    progressive = io.BytesIO()
    Image.fromarray(photo(9, (64, 64))).save(progressive, "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    return [*found, progressive.getvalue()]


def mutants(count: int) -> Iterator[bytes]:
    """The same files in every run: cut, with flipped bits, or with bytes overwritten, repeated or from another file."""
    rng, originals = random.Random(4), seeds()
    for _ in range(count):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            length = rng.randint(1, 64)
            match rng.randrange(6):
                case 0:
                    data = data[:at]
                case 1:
                    for _ in range(rng.randint(1, 8)):
                        if data:
                            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                case 2:
                    data[at : at + length] = rng.choice([b"\0", b"\xff", b"\x7f\xff\xff\xff"]) * (length // 4 + 1)
                case 3:
                    data[at:at] = data[at : at + length] * rng.randint(1, 200)
                case 4:
                    other = rng.choice(originals)
                    data[at:] = other[rng.randrange(len(other)) :]
                case _:  # sizes, counts and offsets lie near the front
                    data[at % 64 : at % 64 + 4] = rng.randbytes(4)
        yield bytes(data)


def memory() -> int:
    """Resident bytes of Serve's replicas and proxies, decoders and nginx, all of them below this process."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            if "ServeReplica" in name or "ProxyActor" in name or "clipflow_ray.sandbox" in name or "nginx" in name:
                total += process.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


@pytest.mark.parametrize("count", [10_000])
def test_each_hostile_image_gets_a_verdict_or_an_error_code_in_time(site: Site, count: int) -> None:
    images = list(mutants(count))
    seen: set[str] = set()
    before = 0
    with httpx.Client(base_url=site.url, timeout=30) as client:
        for at in range(0, count, PER_REQUEST):
            chunk = images[at : at + PER_REQUEST]
            answer = client.post("/v1/detect", files=[("files", (f"{n}", data)) for n, data in enumerate(chunk)])
            assert answer.status_code == 200, answer.text
            # The first request starts the decoders.
            assert at == 0 or answer.elapsed.total_seconds() <= SLOWEST_SECONDS
            results = DetectResponse.model_validate_json(answer.content).results
            assert [result.index for result in results] == list(range(len(chunk)))
            seen |= {result.error.code if result.error else "ok" for result in results}
            # Allocators and decoders take about 130 MiB over the first 10,000 images and 40 over the next 30,000. So
            # the first half is the warm-up, and the second half shows leaks.
            if at // PER_REQUEST == count // PER_REQUEST // 2:
                before = memory()
        assert client.get("/readyz").status_code == 200
    assert before and memory() - before <= GROWTH
    assert {"ok", "truncated", "unsupported_format"} <= seen <= {"ok", *ITEM_CODES} - {"internal", "decoder_crash"}


@pytest.mark.parametrize("count", [5_000])
def test_requests_generated_from_the_openapi_document_never_get_a_5xx(site: Site, count: int) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{site.url}/openapi.json").json())
    valid, invalid = (schema.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
    before = memory()
    with httpx.Client(base_url=site.url, timeout=30) as client:

        @given(case=valid | invalid)
        @settings(
            max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        def every_case(case: schemathesis.Case[Any]) -> None:
            start = time.monotonic()
            answer = case.call(base_url=site.url)
            assert time.monotonic() - start <= SLOWEST_SECONDS
            assert answer.status_code < 500, (answer.content, case.as_curl_command())
            (request_id,) = answer.headers["x-request-id"]
            assert len(request_id) == 32
            if answer.status_code >= 400:
                assert json.loads(answer.content)["error"]["request_id"] == request_id

        every_case()
        assert client.get("/readyz").status_code == 200
    assert memory() - before <= GROWTH
