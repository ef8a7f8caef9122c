"""Reading, decoding and scoring with the test tower over plain loops of Pillow and open_clip."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from open_clip import image_transform
from PIL import Image
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from clipflow_ray.audit.run import audit
from clipflow_ray.config import TEST_TOWER, AuditConfig, EncoderConfig
from clipflow_ray.data import resources
from clipflow_ray.lab.benchmark.common import BATCH, Benchmark, interleaved, jpegs, untrained
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.weights import build_tower, load_weights

_FILES: Final = 256


class PipelineBenchmark(Benchmark):
    """The pipeline over a loop in one process, and over a torch DataLoader with two workers."""

    objects: int = Field(description="Objects of the larger audit.")
    whole: float = Field(description="Objects per second of the larger audit, start-up included.")
    ratio_to_dataloader: float = Field(description="Median ratio to the rate of the DataLoader.")
    spread_to_dataloader: tuple[float, float] = Field(description="Lowest and highest such ratio.")
    rate_of_dataloader: float = Field(description="Median images per second of the DataLoader.")
    max_score_difference: float = Field(description="Largest difference between our score and the loop's.")


def pipeline_against_plain_loops(objects: int, rounds: int) -> PipelineBenchmark:
    """Reading, decoding and scoring through Ray Data against loops of Pillow and open_clip's own transform.

    The test tower is used, so that reading and decoding dominate. `ratio` is over a loop in one process,
    `ratio_to_dataloader` over a torch DataLoader with two workers. All score the same local JPEGs on the same cores.
    The pipeline's rate is a marginal one: the additional objects of an audit against one of a quarter of its size,
    divided by the additional time. So start-up is excluded, as it is for the loops. `whole` is the rate of the larger
    audit with its start-up.
    """
    encoder = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    weights = load_weights(encoder)
    tower = build_tower(weights.architecture)
    tower.load_state_dict(weights.state)
    tower.eval()
    transform = image_transform(weights.view.sizes[0], is_train=False, mean=weights.view.mean, std=weights.view.std)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = untrained(encoder, os.path.join(folder, "checkpoint"))
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
            table = pq.read_table(record.ledger, columns=["uri", "score"])
            by_uri = dict(zip(table["uri"].to_pylist(), table["score"].to_pylist(), strict=True))
            scores["ours"] = np.array([by_uri[path] for path in files], np.float32)
            return record.timing.seconds

        def ours(_: int) -> float:
            few, many = seconds(objects // 4), seconds(objects)
            whole.append(objects / many)
            marginal.append((objects - objects // 4) / (many - few))
            return marginal[-1]

        def loop(workers: int) -> float:
            loader = DataLoader(_Files(looped, transform), BATCH, num_workers=workers)
            start = time.perf_counter()
            with torch.inference_mode():
                likelihood = torch.cat([flow(tower(batch)).per_dim for batch in loader])
            scores["plain"] = -likelihood[: len(files)].numpy()
            return len(looped) / (time.perf_counter() - start)

        def plain(_: int) -> float:
            parallel.append(loop(2))
            return loop(0)

        result = interleaved("pipeline", ours, plain, rounds)
    ray.shutdown()
    over = np.array(marginal) / (0.5 * (np.array(parallel[:-1]) + np.array(parallel[1:])))
    return PipelineBenchmark(
        **dict(result),
        objects=objects,
        whole=float(np.median(whole)),
        ratio_to_dataloader=float(np.median(over)),
        spread_to_dataloader=(float(over.min()), float(over.max())),
        rate_of_dataloader=float(np.median(parallel)),
        max_score_difference=float(np.abs(scores["ours"] - scores["plain"]).max()),
    )


class _Files(Dataset[torch.Tensor]):
    """Image files and a transform, as a plain script would write it."""

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> torch.Tensor:
        return self._transform(Image.open(self._paths[at]))


def _write_files(folder: Path) -> list[str]:
    """Write JPEGs and return their paths."""
    paths = [str(folder / f"{at:06d}.jpg") for at in range(_FILES)]
    for path, data in zip(paths, jpegs(_FILES), strict=True):
        Path(path).write_bytes(data)
    return paths
