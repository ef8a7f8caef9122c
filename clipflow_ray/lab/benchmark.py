"""Speed as ratios of two things measured in one run, interleaved: the only performance figures this project quotes."""

import io
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from open_clip import image_transform
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clipflow_ray import images, proxies, sandbox
from clipflow_ray.audit.run import audit
from clipflow_ray.client import Client
from clipflow_ray.config import (
    TEST_TOWER,
    AuditConfig,
    EncoderConfig,
    FlowConfig,
    ImageLimits,
    ObjectiveConfig,
    ProxyConfig,
    ServeConfig,
)
from clipflow_ray.data import resources
from clipflow_ray.data.listing import write_manifest
from clipflow_ray.demo import photographs, s3_server
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.weights import build_tower, load_weights
from clipflow_ray.place import Place
from clipflow_ray.serve.edge import nginx_path
from clipflow_ray.serve.launch import endpoint
from clipflow_ray.serve.upstreams import upstreams

_BATCH: Final = 32
_100_KB: Final = (1024, 768)  # as `_jpegs` makes them
_FILES: Final = 256
_BARE_BATCHES: Final = 2
_CLIENTS: Final = 4
_PORT: Final = 8100
PROXIES_PER_SECOND: Final = 150.0


def audit_against_bare_encoder(objects: int, rounds: int) -> dict[str, Any]:
    """Whole audits from S3 against a bare loop encoder(batch) on ready tensors, with a thread a core.

    An audit is timed as a user sees it: listing, actor start, reading, decoding, scoring, ledger; Ray itself is up.
    """
    config = AuditConfig(input=(), output="")
    encoder = Encoder(load_checkpoint(config.checkpoint).encoder)
    views = np.random.default_rng(0).integers(0, 256, (_BATCH, encoder.view.size, encoder.view.size, 3), np.uint8)
    with s3_server() as bucket, tempfile.TemporaryDirectory() as folder:
        resources.connect()  # after the server: workers inherit the credentials that it sets
        torch.set_num_threads(resources.cores())
        source = _fill(bucket, objects)

        def one_audit(at: int) -> float:
            start = time.perf_counter()
            changes = {"input": (source,), "output": os.path.join(folder, str(at)), "s3": bucket.options}
            audit(config.model_copy(update=changes))
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


def pipeline_against_plain_loops(objects: int, rounds: int) -> dict[str, Any]:
    """Reading, decoding and scoring through Ray Data against loops of Pillow and open_clip's own transform.

    With the test tower, so that reading and decoding dominate. `ratio` is over one process, `ratio_to_dataloader` over
    a torch DataLoader with two workers; all score the same local JPEGs on the same cores. The pipeline's rate is that
    of the objects by which one audit exceeds another of a quarter its size: the imports of its processes drop out, as
    those of the loops do. `whole` is the rate of the larger audit with its start-up.
    """
    encoder = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    weights = load_weights(encoder)
    tower = build_tower(weights.architecture)
    tower.load_state_dict(weights.state)
    tower.eval()
    transform = image_transform(weights.view.size, is_train=False, mean=weights.view.mean, std=weights.view.std)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _untrained(encoder, os.path.join(folder, "checkpoint"))
        files = _write_files(Path(folder))
        looped = [files[at % len(files)] for at in range(max(len(files), objects // 8))]
        config = AuditConfig(input=(), output="", checkpoint=checkpoint, alpha=0.1, gallery=0)
        resources.connect()
        torch.set_num_threads(resources.cores())
        flow = load_checkpoint(checkpoint).flow()
        scores: dict[str, NDArray[np.float32]] = {}
        whole: list[float] = []
        marginal: list[float] = []
        parallel: list[float] = []

        def seconds(count: int) -> float:
            source = Path(folder, f"{count}.txt")
            source.write_text("\n".join(files[at % len(files)] for at in range(count)))
            changes = {"input": (str(source),), "output": tempfile.mkdtemp(dir=folder)}
            record = audit(config.model_copy(update=changes))
            table = pq.read_table(record["ledger"], columns=["uri", "score"])
            by_uri = dict(zip(table["uri"].to_pylist(), table["score"].to_pylist(), strict=True))
            scores["ours"] = np.array([by_uri[path] for path in files], np.float32)
            return float(record["timing"]["seconds"])

        def ours(_: int) -> float:
            few, many = seconds(objects // 4), seconds(objects)
            whole.append(objects / many)
            marginal.append((objects - objects // 4) / (many - few))
            return marginal[-1]

        def loop(workers: int) -> float:
            loader = DataLoader(_Files(looped, transform), _BATCH, num_workers=workers)
            start = time.perf_counter()
            with torch.inference_mode():
                likelihood = torch.cat([flow(tower(batch)).per_dim for batch in loader])
            scores["plain"] = -likelihood[: len(files)].numpy()
            return len(looped) / (time.perf_counter() - start)

        def plain(_: int) -> float:
            parallel.append(loop(2))
            return loop(0)

        result = _interleaved("pipeline", ours, plain, rounds)
    ray.shutdown()
    over = np.array(marginal) / (0.5 * (np.array(parallel[:-1]) + np.array(parallel[1:])))
    return result | {
        "objects": objects,
        "whole": float(np.median(whole)),
        "ratio_to_dataloader": float(np.median(over)),
        "spread_to_dataloader": [float(over.min()), float(over.max())],
        "rate_of_dataloader": float(np.median(parallel)),
        "max_score_difference": float(np.abs(scores["ours"] - scores["plain"]).max()),
    }


def sandboxed_decoding(rounds: int) -> dict[str, Any]:
    """Decoding to the encoder's view in one killable child over the same in this process, on one thread.

    `ratio` is for photographs of two megapixels, `ratio_small` for the 640 x 480 of the other benchmarks.
    """
    limits, spec = ImageLimits(), load_checkpoint(AuditConfig(output="").checkpoint).view
    torch.set_num_threads(1)

    def compared(contents: list[bytes]) -> dict[str, Any]:
        def rate(decode: Callable[[], object]) -> Callable[[int], float]:
            def measured(_: int) -> float:
                start = time.perf_counter()
                decode()
                return len(contents) / (time.perf_counter() - start)

            return measured

        child = rate(lambda: sandbox.decode_all(contents, limits, spec))
        here = rate(lambda: [images.view(images.decode(data, limits).rgb, spec) for data in contents])
        child(0)
        return _interleaved("sandbox", child, here, rounds)

    small = compared(list(_jpegs(_BATCH)))
    return compared(list(_jpegs(_BATCH, (1600, 1200)))) | {"ratio_small": small["ratio"]}


def serving(images: int, rounds: int) -> dict[str, Any]:
    """Images per second of a saturated endpoint with real weights over a bare encoder loop on the same cores.

    `added_ms` is what the way to a replica of Serve, as the edge asks it, and the way through the edge add to the
    median time of one image of 100 kB over `Detector.detect`, with the test tower.
    """
    contents = list(_jpegs(images))
    encoder = Encoder(load_checkpoint(ServeConfig().checkpoint).encoder)
    views = np.random.default_rng(0).integers(0, 256, (_BATCH, encoder.view.size, encoder.view.size, 3), np.uint8)
    torch.set_num_threads(resources.cores())

    def bare(_: int) -> float:
        start = time.perf_counter()
        for _ in range(_BARE_BATCHES):
            encoder.embed(views)
        return _BATCH * _BARE_BATCHES / (time.perf_counter() - start)

    with endpoint(ServeConfig(), "127.0.0.1", _PORT) as url, ThreadPoolExecutor(_CLIENTS) as clients:

        def served(_: int) -> float:
            start = time.perf_counter()
            requests = [contents[at : at + _BATCH] for at in range(0, images, _BATCH)]
            for answer in clients.map(lambda request: Client(url).detect(request), requests):
                assert all(result.status == "ok" for result in answer.results)
            return images / (time.perf_counter() - start)

        served(0)
        bare(0)
        result = _interleaved("serve", served, bare, rounds)
    return result | {"images": images, "added_ms": _added_latency(list(_jpegs(_BATCH, _100_KB)), rounds)}


def _added_latency(contents: list[bytes], rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _untrained(
            EncoderConfig(model=TEST_TOWER, pretrained="seed:0"), os.path.join(folder, "checkpoint")
        )
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
            for at in range(rounds + 1):  # the first is to warm up
                for name, way in ways.items():
                    for data in contents:
                        start = time.perf_counter()
                        way(data)
                        if at:
                            seconds[name].append(time.perf_counter() - start)
    direct = float(np.median(seconds.pop("direct")))
    return {name: 1000.0 * (float(np.median(each)) - direct) for name, each in seconds.items()}


def listing(keys: int, rounds: int) -> dict[str, Any]:
    """Keys per second into a manifest, of a list file over one of an eighth of its length: 1 is linear."""
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
        result = _interleaved("listing", whole, eighth, rounds)
    ray.shutdown()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result | {"keys": keys, "driver_peak_mib": peak // 1024}


def slowest_proxy_family(rounds: int) -> dict[str, Any]:
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
    ratios = np.array(rates) / PROXIES_PER_SECOND
    return {
        "name": "proxies",
        "ratio": float(np.median(ratios)),
        "rates": {"slowest_family": float(np.median(rates)), "required": PROXIES_PER_SECOND},
        "family": slowest,
        "n": rounds,
        "spread": [float(ratios.min()), float(ratios.max())],
        "larger_views": {
            size: {"family": name, "rate": float(np.median(each))} for size, (name, each) in larger.items()
        },
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


class _Files(Dataset[torch.Tensor]):
    """Image files through a transform, as people write it."""

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> torch.Tensor:
        return self._transform(Image.open(self._paths[at]))


def _untrained(encoder: EncoderConfig, path: str) -> str:
    """A checkpoint whose flow never saw an image: it costs what a trained one costs."""
    tower, limits = Encoder(encoder, "cpu"), ImageLimits()
    views = np.stack([images.view(images.decode(data, limits).rgb, tower.view) for data in _jpegs(_BATCH)])
    embeddings = torch.from_numpy(tower.embed(views))
    flow = Flow((embeddings.shape[1],), FlowConfig())
    flow.fit_standardizer(embeddings)
    checkpoint = Checkpoint(
        encoder=encoder,
        encoder_fingerprint=tower.fingerprint,
        view=tower.view,
        segments=flow.segments,
        flow_config=FlowConfig(),
        flow_state=flow.state_dict(),
        limits=ImageLimits(),
        objective=ObjectiveConfig(),
        proxies=ProxyConfig(),
        calibration=Calibration.fit(np.linspace(0.0, 1.0, 200, dtype=np.float32), ["jpeg|0-512"] * 200),
        reference={},
        training={},
    )
    save_checkpoint(checkpoint, path)
    return path


def _write_files(folder: Path) -> list[str]:
    """Paths of JPEGs on disk."""
    paths = [str(folder / f"{at:06d}.jpg") for at in range(_FILES)]
    for path, data in zip(paths, _jpegs(_FILES), strict=True):
        Path(path).write_bytes(data)
    return paths


def _fill(bucket: Place, objects: int) -> str:
    """JPEGs in a bucket; returns the URI of their prefix."""
    images = bucket / "images/"
    for at, data in enumerate(_jpegs(objects)):
        (images / f"{at:06d}.jpg").write(data)
    return images.uri


def _jpegs(count: int, size: tuple[int, int] = (640, 480)) -> Iterator[bytes]:
    """JPEGs of `size` (width, height) cut from the demo's photographs, enlarged to twice that."""
    width, height = size
    photos = [Image.fromarray(photo).resize((2 * width, 2 * height)) for _, photo in photographs()]
    rng = np.random.default_rng(0)
    for at in range(count):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        out = io.BytesIO()
        photos[at % len(photos)].crop((left, top, left + width, top + height)).save(out, "JPEG", quality=90)
        yield out.getvalue()
