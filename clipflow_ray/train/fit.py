"""Fit the flow with Ray Train on stored embeddings: any number of workers, a checkpoint after every epoch."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer, get_device, prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipflow_ray.config import TrainConfig, stable_hash, validated
from clipflow_ray.data import resources
from clipflow_ray.errors import TrainingError
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run
from clipflow_ray.train import features
from clipflow_ray.train.loop import SELECTION, Loop
from clipflow_ray.train.split import split

_FLOW, _OPTIMIZER, _STATE = "flow.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Fitted:
    """The flow's state at the chosen epoch, the metrics of that epoch, and those of every epoch up to it."""

    flow_state: dict[str, Tensor]
    metrics: dict[str, float]
    history: list[dict[str, float]]


def fit(config: TrainConfig, run: Run, widths: tuple[int, ...]) -> Fitted:
    """Fit the flow on a finished features run and return the epoch with the highest `selection` AUROC.

    `config.segments` are resolved, and `widths` are theirs. The name of the Ray Train run is a hash of its settings, so
    a repeated call continues an interrupted run, and returns at once if the run was finished. Raises ResourceError
    before the run starts, and TrainingError if the run fails or reports no checkpoint.
    """
    per_worker = resources.plan_training(config.fit.workers)
    place = Place.at(config.output, config.s3) / "fit"
    place.make_folder()
    settings = {
        "config": config.model_dump(mode="json", exclude={"pool"}),
        "features": run.place.uri,
        "widths": list(widths),
    }
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.fit.workers,
            use_gpu="GPU" in per_worker,
            resources_per_worker=dict(per_worker),
        ),
        run_config=ray.train.RunConfig(
            name=stable_hash(settings),
            **place.arguments("storage_path", "storage_filesystem"),
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
        raise TrainingError("Training reported no checkpoint. See the worker logs that Ray names above.")
    with best.as_directory() as folder:
        state = json.loads((Path(folder) / _STATE).read_text())
        flow_state = load_file(Path(folder) / _FLOW)
    return Fitted(flow_state, state["history"][-1], state["history"])


def train_loop(settings: dict[str, Any]) -> None:
    """Train on one worker. It takes its share of each global batch; after each step all workers hold the same model."""
    config = validated(TrainConfig, settings["config"])
    loaded = features.load(Run(Place.at(settings["features"], config.s3)), config.segments, config.proxies)
    context = ray.train.get_context()
    Worker(
        config,
        split(loaded, config.split),
        tuple(settings["widths"]),
        context.get_world_rank(),
        context.get_world_size(),
        get_device(),
        prepare_model,
    ).run()


class Worker(Loop):
    """The training loop under Ray Train: it reports each epoch and resumes from the latest checkpoint."""

    def run(self) -> None:
        """Train the remaining epochs. Every rank reports each epoch; rank 0 adds a checkpoint."""
        first = self._restore()
        for epoch in range(first, self.fit.epochs):
            figures = self.epoch(epoch)
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if self.rank == 0:
                    self._save(Path(folder), epoch)
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report(figures, checkpoint=checkpoint)

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
        """Restore the latest checkpoint of this run, if there is one, and return the number of the next epoch."""
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
