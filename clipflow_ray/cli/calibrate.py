"""`calibrate`."""

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
    Inputs,
    Output,
    Payer,
    Region,
    Unsigned,
    UriColumn,
    inventory_options,
    pool_options,
    s3_options,
)
from clipflow_ray.config import CalibrateConfig, load_yaml


def calibrate(
    inputs: Inputs = None,
    output: Output = None,
    checkpoint: Checkpoint = None,
    keep_shipped: Annotated[
        float | None,
        typer.Option("--keep-shipped", help="Weight of the old calibration, from 0 to below 1; default 0."),
    ] = None,
    input_format: Format = None,
    group_by: GroupBy = None,
    uri_column: UriColumn = None,
    bytes_column: BytesColumn = None,
    group_column: GroupColumn = None,
    include: Include = None,
    exclude: Exclude = None,
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
    """Calibrate a checkpoint on your own photographs, or on the photographs of a finished audit; nothing is trained."""
    settings = load_yaml(
        CalibrateConfig,
        None,
        {
            "input": tuple(inputs or ()),
            "output": output,
            "checkpoint": checkpoint,
            "keep_shipped": keep_shipped,
            "inventory": inventory_options(
                input_format, group_by, uri_column, bytes_column, group_column, include=include, exclude=exclude
            ),
            "s3": s3_options(endpoint_url, region, unsigned, request_payer),
            "pool": pool_options(encoders, gpus_per_encoder, accelerator_type, decoders),
        },
    )
    from clipflow_ray.calibrate import calibrate as run
    from clipflow_ray.calibrate import in_words

    report = run(settings)
    print(report.model_dump_json(indent=1) if as_json else "\n".join(in_words(report)))
