"""The one Ray Data graph of this package: read and decode in tasks, then encode in actors."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from clipflow_ray.data.resources import DECODE_CPUS, ScoringPlan


def read_then_encode(
    manifest: Dataset,
    plan: ScoringPlan,
    batch_size: int,
    read: Callable[..., pa.Table],
    read_arguments: dict[str, Any],
    encoder: type,
    encoder_arguments: dict[str, Any],
) -> Dataset:
    """Manifest rows -> the same number of rows, with the output of `encoder` for their views.

    `read` is a function Table -> Table that runs in tasks of half a CPU; `encoder` is an actor class whose instances
    hold the plan's CPUs and GPUs. Both see batches of about `batch_size` rows. `encoder` is called with the number of
    its threads as `cpus` too.
    """
    stage: Any = read  # Ray Data's annotation allows no keyword arguments besides the batch
    return manifest.map_batches(
        stage,
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=TaskPoolStrategy(size=plan.decoders),
        num_cpus=DECODE_CPUS,
        fn_kwargs=read_arguments,
    ).map_batches(
        encoder,
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ActorPoolStrategy(min_size=plan.fewest, max_size=plan.most, initial_size=plan.initial),
        num_cpus=plan.encoder_cpus,
        num_gpus=plan.encoder_gpus or None,
        accelerator_type=plan.accelerator_type,
        fn_constructor_kwargs={**encoder_arguments, "cpus": plan.threads},
    )
