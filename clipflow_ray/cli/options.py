"""Options that several commands share."""

from typing import Annotated, Any

import typer

from clipflow_ray.config import ImageLimits, validated
from clipflow_ray.inputs.registry import FORMATS

Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="Folder, s3:// prefix, parquet file, tar or list; repeatable.")
]
Output = Annotated[str | None, typer.Option("--output", help="Folder or s3:// prefix to write to.")]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Checkpoint directory; default: the packaged one.")
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with settings; flags override it.")]
Endpoint = Annotated[str | None, typer.Option("--endpoint-url", help="S3 endpoint; default: AWS_ENDPOINT_URL.")]
Region = Annotated[str | None, typer.Option("--region", help="S3 region.")]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="Read public buckets without credentials.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="False-positive rate to flag at; default 0.01.")]
Format = Annotated[str | None, typer.Option("--input-format", help=f"One of auto, {', '.join(FORMATS)}; default auto.")]
GroupBy = Annotated[str | None, typer.Option("--group-by", help="prefix:N: by the first N folders; default prefix:1.")]
UriColumn = Annotated[str | None, typer.Option("--uri-column", help="Column with URIs; default uri.")]
BytesColumn = Annotated[
    str | None, typer.Option("--bytes-column", help="Column with image bytes; default: the first column of bytes.")
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


def inventory_options(
    input_format: str | None,
    group_by: str | None,
    uri_column: str | None,
    bytes_column: str | None,
    group_column: str | None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """The `inventory` settings that the flags give; None for a flag that was not given."""
    return {
        "input_format": input_format,
        "group_by": group_by,
        "uri_column": uri_column,
        "bytes_column": bytes_column,
        "group_column": group_column,
        "label_column": label_column,
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


def s3_options(endpoint_url: str | None, region: str | None, unsigned: bool) -> dict[str, Any]:
    """The `s3` settings that the flags give; None for a flag that was not given."""
    return {"endpoint_url": endpoint_url, "region": region, "unsigned": unsigned or None}
