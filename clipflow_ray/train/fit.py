"""Ray Train fits the flow on cached embeddings: any number of workers, a checkpoint every epoch."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from clipflow_ray.config import FitConfig, TrainConfig, stable_hash, validated
from clipflow_ray.data import resources
from clipflow_ray.data.resumable import Run
from clipflow_ray.errors import TrainingError
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.objective import BOUNDARY_QUANTILE, Objective
from clipflow_ray.storage import filesystem, join
from clipflow_ray.train import features
from clipflow_ray.train.features import Features
from clipflow_ray.train.split import Split, split

SELECTION: Final = "selection"
_FLOW, _OPTIMIZER, _STATE = "flow.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Fitted:
    """The flow's state at the chosen epoch, that epoch's metrics, and the metrics of all of them."""

    flow_state: dict[str, Tensor]
    metrics: dict[str, float]
    history: list[dict[str, float]]


def fit(config: TrainConfig, run: Run, segments: tuple[int, ...]) -> Fitted:
    """Fit the flow on a finished features run and return the epoch that ranks held-out proxies best.

    The Ray Train run is named by everything that shapes it: a repeated call continues a run that was cut off, and
    returns at once when it was finished. Raises ResourceError before start, TrainingError when no epoch was good.
    """
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    per_worker = resources.check_training(config.fit.workers, use_gpu)
    fs, path = filesystem(join(config.output, "fit"), config.s3)
    fs.create_dir(path, recursive=True)
    settings = {"config": config.model_dump(mode="json"), "features": run.folder, "segments": list(segments)}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.fit.workers, use_gpu=use_gpu, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name=stable_hash(settings),
            storage_path=path,
            storage_filesystem=fs,
            failure_config=ray.train.FailureConfig(max_failures=config.fit.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=SELECTION, checkpoint_score_order="max"
            ),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TrainingError(f"Training failed after {config.fit.max_failures} restarts: {reason}") from error
    best = result.get_best_checkpoint(SELECTION, "max")
    if best is None:
        raise TrainingError("Training reported no checkpoint; see the worker logs that Ray names above.")
    with best.as_directory() as folder:
        state = json.loads((Path(folder) / _STATE).read_text())
        flow_state = load_file(Path(folder) / _FLOW)
    return Fitted(flow_state, state["history"][-1], state["history"])


def train_loop(settings: dict[str, Any]) -> None:
    """One worker: its share of each global batch, the same model as all others after every step."""
    config = validated(TrainConfig, settings["config"])
    loaded = features.load(Run(settings["features"], config.s3), config.encoder.feature, config.proxies)
    context = ray.train.get_context()
    Worker(
        config,
        split(loaded, config.split),
        tuple(settings["segments"]),
        context.get_world_rank(),
        context.get_world_size(),
    ).run()


class Worker:
    """The state of one training worker."""

    def __init__(self, config: TrainConfig, data: Split, segments: tuple[int, ...], rank: int, world: int) -> None:
        self.config, self.data, self.rank, self.world = config, data, rank, world
        self.device = get_device()
        torch.manual_seed(config.fit.seed)  # the same initial weights on every rank
        self.flow = Flow(segments, config.flow)
        self.flow.fit_standardizer(torch.from_numpy(data.natural.embedding))
        self.model: nn.Module = prepare_model(self.flow)
        self.objective = Objective(config.objective).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.flow.parameters(), lr=config.fit.learning_rate, weight_decay=config.fit.weight_decay
        )
        self.natural = self._share(data.natural)
        self.proxy = self._share(data.proxy)
        self.steps = max(1, len(data.natural) // config.fit.batch_size)
        self.history: list[dict[str, float]] = []
        with torch.no_grad():
            self.objective.anchor(self._per_dim(data.natural))

    def run(self) -> None:
        """All epochs that are still to do; every rank reports each one, rank 0 with a checkpoint."""
        first = self._restore()
        for epoch in range(first, self.config.fit.epochs):
            loss = self._epoch(epoch)
            self.history.append({"epoch": float(epoch), "loss": loss, **validate(self.flow, self.data, self.device)})
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if self.rank == 0:
                    self._save(Path(folder), epoch)
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report(self.history[-1], checkpoint=checkpoint)

    def _epoch(self, epoch: int) -> float:
        fit = self.config.fit
        share = max(1, fit.batch_size // self.world)
        generator = torch.Generator().manual_seed(_seed(fit.seed, epoch, self.rank))
        natural = _cycled(len(self.natural), share * self.steps, generator)
        proxy = _cycled(len(self.proxy), share * self.steps, generator)
        self.model.train()
        total = 0.0
        for step in range(self.steps):
            rows = slice(step * share, (step + 1) * share)
            batch = torch.cat([self.natural[natural[rows]], self.proxy[proxy[rows]]]).to(self.device)
            likely, unlikely = self.model(batch).per_dim.split([share, share])
            loss = self.objective(likely, unlikely)
            if not torch.isfinite(loss):
                raise TrainingError(f"The loss is {loss.item()} in epoch {epoch}: lower the learning rate.")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.flow.parameters(), fit.gradient_clip)
            rate = learning_rate(fit, epoch * self.steps + step, fit.epochs * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.objective.follow(self._mean_over_workers(torch.quantile(likely.detach(), BOUNDARY_QUANTILE)))
            total += loss.item()
        return total / self.steps

    def _share(self, part: Features) -> Tensor:
        """This rank's rows; a rank never has none."""
        rows = part.embedding[self.rank :: self.world]
        return torch.from_numpy(np.ascontiguousarray(rows if len(rows) else part.embedding))

    def _per_dim(self, part: Features) -> Tensor:
        result: Tensor = self.flow(torch.from_numpy(part.embedding).to(self.device)).per_dim
        return result

    def _mean_over_workers(self, value: Tensor) -> Tensor:
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value / self.world

    def _save(self, folder: Path, epoch: int) -> None:
        save_file({name: value.cpu().contiguous() for name, value in self.flow.state_dict().items()}, folder / _FLOW)
        moments = {
            f"{index}.{name}": value.cpu().contiguous()
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        save_file({**moments, "boundary": self.objective.boundary.cpu().clone()}, folder / _OPTIMIZER)
        (folder / _STATE).write_text(json.dumps({"epoch": epoch, "history": self.history}))

    def _restore(self) -> int:
        """Take up the latest checkpoint of this run, if there is one; returns the epoch to do next."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as name:
            folder = Path(name)
            self.flow.load_state_dict(load_file(folder / _FLOW))
            tensors = load_file(folder / _OPTIMIZER)
            self.objective.boundary.copy_(tensors.pop("boundary"))
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                index, moment = key.split(".", 1)
                state.setdefault(int(index), {})[moment] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            record = json.loads((folder / _STATE).read_text())
        self.history = record["history"]
        return int(record["epoch"]) + 1


def validate(flow: Flow, data: Split, device: torch.device) -> dict[str, float]:
    """Figures on sources that training never saw; none of them involves an AI-generated image.

    `auroc_<family>` ranks validation naturals against that family's proxies; `selection` is the held-out family's, or
    the mean over families where none is held out.
    """
    flow.eval()
    with torch.inference_mode():

        def suspicion(part: Features) -> np.ndarray[Any, np.dtype[np.float32]]:
            result: np.ndarray[Any, np.dtype[np.float32]] = (
                -flow(torch.from_numpy(part.embedding).to(device)).per_dim.cpu().numpy()
            )
            return result

        natural = suspicion(data.validation_natural)
        scores = {
            str(family): suspicion(part.where(part.family == family))
            for part in (data.validation_proxy, data.held_out)
            for family in np.unique(part.family)
        }
    flow.train()
    auroc = {family: auroc_of(natural, proxy) for family, proxy in scores.items()}
    held_out = [auroc[str(family)] for family in np.unique(data.held_out.family)]
    seen = [value for family, value in auroc.items() if family not in data.held_out.family]
    return {
        "nll_natural": float(natural.mean()),
        "auroc_seen": float(np.mean(seen)),
        SELECTION: float(np.mean(held_out or seen)),
        **{f"auroc_{family}": value for family, value in auroc.items()},
    }


def auroc_of(natural: np.ndarray[Any, Any], suspicious: np.ndarray[Any, Any]) -> float:
    """Area under the ROC curve of scores where higher means suspicious."""
    labels = np.r_[np.zeros(len(natural)), np.ones(len(suspicious))]
    return float(roc_auc_score(labels, np.r_[natural, suspicious]))


def learning_rate(fit: FitConfig, step: int, steps: int) -> float:
    """Linear warm-up over a share of all steps, then a cosine to zero."""
    warmup = max(1, round(fit.warmup_fraction * steps))
    if step < warmup:
        return fit.learning_rate * (step + 1) / warmup
    return fit.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _cycled(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices below `size`: permutation after permutation."""
    rounds = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])[:count]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
