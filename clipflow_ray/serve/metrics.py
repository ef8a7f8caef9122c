"""Metrics named clipflow_serve_*, which Ray collects, and the text of GET /metrics."""

import asyncio
from collections.abc import Iterable
from typing import Final

import httpx
import ray
from ray.util.metrics import Counter, Histogram

_SECONDS: Final = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_SIZES: Final = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
_OURS: Final = "clipflow_serve_"
_SCRAPE_SECONDS: Final = 3.0


class IngressMetrics:
    """Metrics of the ingress: requests, items by verdict, errors by code, and the time to wait for and run decoders."""

    def __init__(self) -> None:
        self.requests = Counter("clipflow_serve_requests", "Requests answered.", ("path", "status"))
        self.request_seconds = Histogram("clipflow_serve_request_seconds", "Seconds of a request.", _SECONDS, ("path",))
        self.items = Counter("clipflow_serve_items", "Images by verdict; `error` if an image has none.", ("verdict",))
        self.errors = Counter("clipflow_serve_errors", "Errors of requests and images by code.", ("scope", "code"))
        self.decode_wait = Histogram("clipflow_serve_decode_wait_seconds", "Wait for a decoder.", _SECONDS)
        self.decode = Histogram("clipflow_serve_decode_seconds", "Seconds to decode an image.", _SECONDS)


class DetectorMetrics:
    """Metrics of a detector: sizes of batches, the time that images wait for one, and the time of a forward pass."""

    def __init__(self) -> None:
        self.batch_size = Histogram("clipflow_serve_batch_size", "Images scored together.", _SIZES)
        self.queue = Histogram("clipflow_serve_queue_seconds", "Wait of an image for its batch.", _SECONDS)
        self.inference = Histogram("clipflow_serve_inference_seconds", "Seconds of scoring one batch.", _SECONDS)


async def exposition() -> str:
    """Our metrics of all nodes in Prometheus text, without the nodes that do not answer in 3 seconds."""
    nodes = await asyncio.to_thread(ray.nodes)
    addresses = [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in nodes if n["Alive"]]
    async with httpx.AsyncClient(timeout=_SCRAPE_SECONDS, trust_env=False) as client:
        texts = await asyncio.gather(*(_scraped(client, address) for address in addresses))
    return "\n".join(_merged(line for text in texts for line in text.splitlines() if _OURS in line)) + "\n"


async def _scraped(client: httpx.AsyncClient, address: str) -> str:
    try:
        return (await client.get(f"http://{address}/metrics")).text
    except httpx.HTTPError:
        return ""


def _merged(lines: Iterable[str]) -> list[str]:
    """Each metric's description once, followed by its samples from all nodes."""
    families: dict[str, list[str]] = {}
    for line in lines:
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0].split()[0]
        for suffix in ("_bucket", "_count", "_sum", "_created"):
            name = name.removesuffix(suffix)
        family = families.setdefault(name, [])
        if not line.startswith("#") or line not in family:
            family.append(line)
    return [line for family in families.values() for line in sorted(family, key=lambda text: not text.startswith("#"))]
