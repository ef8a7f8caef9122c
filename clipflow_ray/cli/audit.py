"""`audit`, `rescore` and `finalize`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from clipflow_ray.cli.exits import FAILED, TOO_MANY_ERRORS, TOO_MANY_FLAGGED
from clipflow_ray.cli.options import (
    AcceleratorType,
    Alpha,
    AsJson,
    BytesColumn,
    Checkpoint,
    ConfigFile,
    Decoders,
    Dedupe,
    Encoders,
    Endpoint,
    Exclude,
    Format,
    GpusPerEncoder,
    GroupBy,
    GroupColumn,
    Include,
    Inputs,
    LabelColumn,
    MaxBytes,
    MaxPixels,
    MaxSeconds,
    MaxSide,
    MinSide,
    Output,
    Payer,
    Precision,
    Region,
    Unsigned,
    UriColumn,
    inventory_options,
    limit_options,
    pool_options,
    s3_options,
)
from clipflow_ray.config import DISCLAIMER, AuditConfig, RescoreConfig, load_yaml

if TYPE_CHECKING:
    from clipflow_ray.audit.record import AuditRecord

AuditsAlpha = Annotated[
    float | None, typer.Option("--alpha", help="False-positive rate to flag at; default: the audit's.")
]


def audit(
    inputs: Inputs = None,
    output: Output = None,
    checkpoint: Checkpoint = None,
    precision: Precision = None,
    alpha: Alpha = None,
    config: ConfigFile = None,
    input_format: Format = None,
    group_by: GroupBy = None,
    uri_column: UriColumn = None,
    bytes_column: BytesColumn = None,
    group_column: GroupColumn = None,
    label_column: LabelColumn = None,
    include: Include = None,
    exclude: Exclude = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    request_payer: Payer = False,
    gallery: Annotated[
        int | None, typer.Option("--gallery", help="Images in each gallery of the report; default 24; 0 for none.")
    ] = None,
    sample: Annotated[
        float | None, typer.Option("--sample", help="Share of the objects to score, such as 0.01; default 1.")
    ] = None,
    dedupe: Dedupe = None,
    keep_embeddings: Annotated[
        bool, typer.Option("--keep-embeddings", help="Store the embeddings too, for `rescore` and `calibrate`.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option("--export", help="csv: write the flagged rows to flagged.csv; csv-all: all rows to ledger.csv."),
    ] = None,
    max_error_rate: Annotated[
        float | None, typer.Option("--max-error-rate", help="Exit with code 3 if a larger share fails; default 1.")
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option("--fail-if-flag-rate-above", help="Exit with code 4 if a larger share is flagged.")
    ] = None,
    encoders: Encoders = None,
    gpus_per_encoder: GpusPerEncoder = None,
    accelerator_type: AcceleratorType = None,
    decoders: Decoders = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images that an encoder takes at a time; default 32.")
    ] = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    min_side: MinSide = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the amount of work and its estimated duration; score nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score every image of a dataset and write a ledger. To continue an interrupted audit, repeat its command."""
    settings = load_yaml(
        AuditConfig,
        config,
        {
            "input": tuple(inputs or ()),
            "output": output,
            "checkpoint": checkpoint,
            "precision": precision,
            "alpha": alpha,
            "inventory": inventory_options(
                input_format, group_by, uri_column, bytes_column, group_column, label_column, include, exclude
            ),
            "s3": s3_options(endpoint_url, region, unsigned, request_payer),
            "limits": limit_options(max_pixels, max_side, min_side, max_bytes, max_seconds),
            "gallery": gallery,
            "sample": sample,
            "dedupe": dedupe,
            "keep_embeddings": keep_embeddings or None,
            "export": export,
            "max_error_rate": max_error_rate,
            "pool": pool_options(encoders, gpus_per_encoder, accelerator_type, decoders),
            "batch_size": batch_size,
        },
    )
    from clipflow_ray.audit.run import audit as run
    from clipflow_ray.audit.run import plan

    if dry_run:
        print(plan(settings).model_dump_json(indent=1))
        return
    record = run(settings)
    _print(record, as_json)
    if record.error_rate > settings.max_error_rate:
        print(
            f"{record.error_rate:.1%} of the objects failed; the limit is {settings.max_error_rate:.1%}.",
            file=sys.stderr,
        )
        sys.exit(TOO_MANY_ERRORS)
    share = record.flagged.share
    if fail_above is not None and share is not None and share > fail_above:
        print(f"{share:.1%} of the scored images are flagged; the limit is {fail_above:.1%}.", file=sys.stderr)
        sys.exit(TOO_MANY_FLAGGED)


def rescore(
    run: Annotated[str, typer.Argument(help="Folder or s3:// prefix of a finished audit with --keep-embeddings.")],
    checkpoint: Checkpoint = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder or s3:// prefix to write to; default: a folder below RUN.")
    ] = None,
    alpha: AuditsAlpha = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    as_json: AsJson = False,
) -> None:
    """Judge a finished audit by another checkpoint of the same encoder, without reading an image."""
    settings = load_yaml(
        RescoreConfig,
        None,
        {
            "audit": run,
            "output": output,
            "checkpoint": checkpoint,
            "alpha": alpha,
            "s3": s3_options(endpoint_url, region, unsigned),
        },
    )
    from clipflow_ray.audit.rescore import rescore as judge

    _print(judge(settings), as_json)


def finalize(
    output: Annotated[str, typer.Option("--output", help="Folder or s3:// prefix of a finished audit.")],
    alpha: AuditsAlpha = None,
    dedupe: Annotated[
        str | None, typer.Option("--dedupe", help="sha256: count equal files once; none; default: the audit's.")
    ] = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    as_json: AsJson = False,
) -> None:
    """Write the verdicts, q-values and report of a finished audit again, from its stored scores."""
    changes = load_yaml(
        AuditConfig,
        None,
        {"output": output, "alpha": alpha, "dedupe": dedupe, "s3": s3_options(endpoint_url, region, unsigned)},
    )
    from clipflow_ray.audit.run import judge_again

    _print(judge_again(changes), as_json)


def _print(record: "AuditRecord", as_json: bool) -> None:
    """Print a record. Exit with FAILED if it has no score at all."""
    print(record.model_dump_json(indent=1) if as_json else summary(record))
    if not record.by_status.get("ok"):
        print(f"Nothing was scored: {record.rows} objects, {_counted(record.by_status)}.", file=sys.stderr)
        sys.exit(FAILED)


def summary(record: "AuditRecord") -> str:
    flagged, timing = record.flagged, record.timing
    lines = [f"{record.rows} objects: " + _counted(record.by_status)]
    if record.by_error_code:
        lines.append("errors: " + _counted(record.by_error_code))
    lines.append("verdicts: " + _counted(record.by_verdict))
    if flagged.share is not None and flagged.wilson_95 is not None:
        low, high = flagged.wilson_95
        lines.append(
            f"flagged at alpha {record.alpha:g}: {flagged.count} of {flagged.of} scored, "
            f"{flagged.share:.1%} (95 % interval {low:.1%} to {high:.1%})"
        )
    lines += record.calibration.in_words
    if record.capped:
        lines.append(f"inconclusive for this reason alone, and not counted as flagged: {record.capped}")
    lines.append(f"{timing.objects_per_second:.1f} images/s over {timing.seconds:.0f} s, start-up included")
    lines += [f"ledger: {record.ledger}", f"report: {record.report}"]
    lines += [f"csv: {record.exported}"] if record.exported else []
    lines.append(DISCLAIMER)
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
