"""`evaluate`."""

import sys
import tempfile
from contextlib import nullcontext
from typing import Annotated

import typer

from clipflow_ray.cli.options import (
    AcceleratorType,
    AsJson,
    BytesColumn,
    Checkpoint,
    Decoders,
    Encoders,
    Endpoint,
    Exclude,
    Format,
    GpusPerEncoder,
    GroupBy,
    GroupColumn,
    Include,
    Output,
    Payer,
    Region,
    Unsigned,
    UriColumn,
    inventory_options,
    pool_options,
    s3_options,
)
from clipflow_ray.config import EvaluateConfig, load_yaml


def evaluate(
    natural: Annotated[
        list[str] | None, typer.Option("--natural", help="Natural images; as for audit; repeatable.")
    ] = None,
    generated: Annotated[list[str] | None, typer.Option("--generated", help="AI-generated images; repeatable.")] = None,
    output: Output = None,
    checkpoint: Checkpoint = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="False-positive rate of the threshold; default 0.01 and 0.05.")
    ] = None,
    input_format: Format = None,
    group_by: GroupBy = None,
    uri_column: UriColumn = None,
    bytes_column: BytesColumn = None,
    group_column: GroupColumn = None,
    include: Include = None,
    exclude: Exclude = None,
    seeds: Annotated[
        list[str] | None, typer.Option("--seed-checkpoint", help="Same training with another seed; repeatable.")
    ] = None,
    robustness: Annotated[
        int,
        typer.Option(
            "--robustness",
            min=0,
            help="Images of each class for the robustness curves; default none. Each image costs 17 encodings: 200 of "
            "each class take 23 minutes at 5 encodings/s on a CPU.",
            show_default=False,
        ),
    ] = 0,
    gallery: Annotated[
        int | None, typer.Option("--gallery", help="Images in each gallery of errors; default 24; 0 for none.")
    ] = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    request_payer: Payer = False,
    encoders: Encoders = None,
    gpus_per_encoder: GpusPerEncoder = None,
    accelerator_type: AcceleratorType = None,
    decoders: Decoders = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint and its baselines on labelled images. Groups of the inputs name sources and generators."""
    with nullcontext(output) if output else tempfile.TemporaryDirectory() as folder:
        settings = load_yaml(
            EvaluateConfig,
            None,
            {
                "natural": tuple(natural or ()),
                "generated": tuple(generated or ()),
                "output": folder,
                "checkpoint": checkpoint,
                "alpha": alpha,
                "inventory": inventory_options(
                    input_format, group_by, uri_column, bytes_column, group_column, include=include, exclude=exclude
                ),
                "seeds": tuple(seeds or ()),
                "robustness": robustness,
                "gallery": gallery,
                "s3": s3_options(endpoint_url, region, unsigned, request_payer),
                "pool": pool_options(encoders, gpus_per_encoder, accelerator_type, decoders),
            },
        )
        from clipflow_ray.evaluate.protocol import evaluate as run
        from clipflow_ray.evaluate.text import text

        result = run(settings)
    print(result.model_dump_json() if as_json else text(result))
    if output:
        print(f"page: {output.rstrip('/')}/report.html", file=sys.stderr)
