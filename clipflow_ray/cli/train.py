"""`train` and `proxies`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from clipflow_ray.cli.options import (
    AcceleratorType,
    AsJson,
    BytesColumn,
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
from clipflow_ray.config import DEFAULT_RECIPE, RECIPES, ProxyConfig, TrainConfig, load_yaml, train_config_file


def train(
    inputs: Inputs = None,
    output: Output = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            help=f"YAML file with settings, or a recipe ({', '.join(RECIPES)}); flags override it; "
            f"default: the recipe {DEFAULT_RECIPE}.",
        ),
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
    seed: Annotated[int | None, typer.Option("--seed", help="Random seed of the fit; default 0.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Number of Ray Train workers; default 1.")] = None,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="Train although the calibration is too small to be relied on.")
    ] = False,
    encoders: Encoders = None,
    gpus_per_encoder: GpusPerEncoder = None,
    accelerator_type: AcceleratorType = None,
    decoders: Decoders = None,
    as_json: AsJson = False,
) -> None:
    """Train on natural images: encode views and proxies, fit the flow, calibrate, write a checkpoint."""
    settings = load_yaml(
        TrainConfig,
        train_config_file(config),
        {
            "input": tuple(inputs or ()),
            "output": output,
            "inventory": inventory_options(
                input_format, group_by, uri_column, bytes_column, group_column, include=include, exclude=exclude
            ),
            "s3": s3_options(endpoint_url, region, unsigned, request_payer),
            "pool": pool_options(encoders, gpus_per_encoder, accelerator_type, decoders),
            "allow_small": allow_small or None,
        },
    )
    from clipflow_ray.train.run import train as run

    changes = {key: value for key, value in (("seed", seed), ("workers", workers)) if value is not None}
    result = run(settings.model_copy(update={"fit": settings.fit.model_copy(update=changes)}))
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print(f"checkpoint {result.model_id} in {result.checkpoint}")
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items()))


def proxies(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="Natural images: folder, s3:// prefix, parquet file, tar or list; repeatable."),
    ],
    output: Annotated[str, typer.Option("--output", help="PNG file to write.")],
) -> None:
    """Draw an example of each proxy family and the families' mean radial spectra."""
    from clipflow_ray.train.picture import draw

    count = draw(inputs, output, ProxyConfig())
    print(f"{output}: {count} images")
