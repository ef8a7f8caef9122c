"""Options that several commands share."""

from typing import Annotated, Any

import typer

from clipflow_ray.config import CHECKPOINTS, ImageLimits, PrecisionChoice, validated
from clipflow_ray.inputs.registry import FORMATS

Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="Folder, s3:// prefix, table, archive, list, or a pattern of these; repeatable."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", help="List only files that this pattern fits, such as '*.jpg'; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="List no files that this pattern fits, such as 'thumbs/**'; repeatable."),
]
Output = Annotated[str | None, typer.Option("--output", help="Folder or s3:// prefix to write to.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", help=f"Checkpoint directory, or a packaged one: {', '.join(CHECKPOINTS)}; default: default."
    ),
]
Precision = Annotated[
    PrecisionChoice | None,
    typer.Option(
        "--precision",
        help="Precision of the encoder; default auto: bfloat16 if the machine is fast at it and the checkpoint is "
        "calibrated for it.",
    ),
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with settings; flags override it.")]
Endpoint = Annotated[str | None, typer.Option("--endpoint-url", help="S3 endpoint; default: AWS_ENDPOINT_URL.")]
Region = Annotated[str | None, typer.Option("--region", help="S3 region.")]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="Read public buckets without credentials.")]
Payer = Annotated[bool, typer.Option("--request-payer", help="Pay for the requests to a requester-pays bucket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="False-positive rate to flag at; default 0.01.")]
Format = Annotated[str | None, typer.Option("--input-format", help=f"One of auto, {', '.join(FORMATS)}; default auto.")]
GroupBy = Annotated[str | None, typer.Option("--group-by", help="prefix:N: by the first N folders; default prefix:1.")]
UriColumn = Annotated[str | None, typer.Option("--uri-column", help="Column with URIs; default uri.")]
BytesColumn = Annotated[
    str | None, typer.Option("--bytes-column", help="Column with image bytes; default: the first that holds images.")
]
GroupColumn = Annotated[str | None, typer.Option("--group-column", help="Column with groups; default group.")]
Dedupe = Annotated[str | None, typer.Option("--dedupe", help="sha256: count equal files once; default none.")]
MaxPixels = Annotated[int | None, typer.Option("--max-pixels", help="Most pixels of an image; default 120000000.")]
MaxSide = Annotated[int | None, typer.Option("--max-side", help="Longest side of an image in pixels; default 20000.")]
MinSide = Annotated[int | None, typer.Option("--min-side", help="Shortest side of an image in pixels; default 32.")]
MaxBytes = Annotated[
    int | None, typer.Option("--max-bytes", help="Most bytes of an encoded image; default 67108864, served 10485760.")
]
MaxSeconds = Annotated[
    float | None,
    typer.Option("--max-seconds", help="Processor time for decoding an image; default 10 seconds, served 5."),
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column with labels; default label.")]
Encoders = Annotated[
    str | None,
    typer.Option("--encoders", help="Number of encoders: N, or MIN-MAX; default: by the cluster."),
]
GpusPerEncoder = Annotated[
    str | None, typer.Option("--gpus-per-encoder", help="GPUs of an encoder: 1, a share such as 0.5, or 0 for none.")
]
AcceleratorType = Annotated[
    str | None, typer.Option("--accelerator-type", help="Ray's name of the GPU model to use, such as A100.")
]
Decoders = Annotated[
    str | None, typer.Option("--decoders", help="Most tasks that read and decode at a time; default: by the CPUs.")
]


def inventory_options(
    input_format: str | None,
    group_by: str | None,
    uri_column: str | None,
    bytes_column: str | None,
    group_column: str | None,
    label_column: str | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> dict[str, Any]:
    """The `inventory` settings that the flags give; None for a flag that was not given."""
    return {
        "input_format": input_format,
        "group_by": group_by,
        "uri_column": uri_column,
        "bytes_column": bytes_column,
        "group_column": group_column,
        "label_column": label_column,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
    }


def limit_options(
    max_pixels: int | None,
    max_side: int | None,
    min_side: int | None,
    max_bytes: int | None,
    max_seconds: float | None,
) -> dict[str, Any]:
    """The `limits` settings that the flags give; None for a flag that was not given."""
    return {
        "max_pixels": max_pixels,
        "max_side": max_side,
        "min_side": min_side,
        "max_bytes": max_bytes,
        "max_seconds": max_seconds,
    }


def given_limits(flags: dict[str, Any]) -> ImageLimits:
    """The limits with what `limit_options` gives; raises ConfigError if a value is wrong."""
    return validated(ImageLimits, {name: value for name, value in flags.items() if value is not None})


def s3_options(
    endpoint_url: str | None, region: str | None, unsigned: bool, request_payer: bool = False
) -> dict[str, Any]:
    """The `s3` settings that the flags give; None for a flag that was not given."""
    return {
        "endpoint_url": endpoint_url,
        "region": region,
        "unsigned": unsigned or None,
        "request_payer": request_payer or None,
    }


def pool_options(
    encoders: str | None, gpus_per_encoder: str | None, accelerator_type: str | None, decoders: str | None
) -> dict[str, Any]:
    """The `pool` settings that the flags give; None for a flag that was not given."""
    return {
        "encoders": encoders,
        "gpus_per_encoder": gpus_per_encoder,
        "accelerator_type": accelerator_type,
        "decoders": decoders,
    }
