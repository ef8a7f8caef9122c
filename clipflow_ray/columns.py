"""The columns of the ledger and of the tables it is made from, and the stage that produces each of them.

An audit has four stages: `listing` writes the manifest, `reading` reads and decodes, `scoring` runs the encoder and
the flow, `finalizing` writes the ledger. Each stage adds its columns through this table. A stage that produces a column
that is not listed here, or that does not produce one of its own, raises an error. To add a ledger column, list it here
and produce it in its stage.

Training and evaluation share the first two stages. The columns that they add after that (families, aligned sizes, one
column per encoder feature) belong to their own files and are not listed here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray.errors import ClipflowError

Status = Literal["ok", "error", "skipped_duplicate", "skipped_not_image", "skipped_sample"]
Stage = Literal["listing", "reading", "scoring", "finalizing"]
Values: TypeAlias = Sequence[Any] | NDArray[Any] | pa.Array | pa.ChunkedArray


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type, the stages that write it, and one sentence for the documentation.

    A later stage replaces what an earlier one wrote. A column that `dropped_by` removes does not reach the ledger.
    """

    name: str
    type: pa.DataType
    stages: tuple[Stage, ...]
    meaning: str
    dropped_by: Stage | None = None


STATUSES: Final[dict[Status, str]] = {
    "ok": "The object has a score and a verdict.",
    "error": "The object has no score; `error_code` and `error_message` say why.",
    "skipped_duplicate": "`--dedupe sha256` is given and an earlier id has the same bytes; the row has no verdict.",
    "skipped_not_image": "The object is no image and does not call itself one; `error_message` says what it is.",
    "skipped_sample": "The object is not in the sample of `--sample`; it was not read.",
}

_LISTING: Final[tuple[Stage, ...]] = ("listing",)
_READING: Final[tuple[Stage, ...]] = ("reading",)
_SCORING: Final[tuple[Stage, ...]] = ("scoring",)
_FINALIZING: Final[tuple[Stage, ...]] = ("finalizing",)

COLUMNS: Final = (
    Column("row_id", pa.string(), _LISTING, "Identity of the object: 32 hex digits, the same in every run."),
    Column("uri", pa.string(), _LISTING, "Absolute path or `s3://` URI of the file that holds the image."),
    Column(
        "member",
        pa.string(),
        _LISTING,
        "Member of an archive, or row of a parquet file: `12`, `12:a.jpg` with the path that the table gives, `12/0` "
        "for the first image of a list. Empty for a plain file.",
    ),
    Column("input_format", pa.string(), _LISTING, "Input format that listed the object and reads it.", "reading"),
    Column(
        "offset",
        pa.int64(),
        _LISTING,
        "First byte of a tar member, number of a zip member, or row number in a parquet file.",
        "reading",
    ),
    Column(
        "problem",
        pa.string(),
        _LISTING,
        "Why the object is not read: `CODE: MESSAGE` of its error, or `not_an_image: MESSAGE`; null if it is read.",
        "reading",
    ),
    Column("etag", pa.string(), _LISTING, "ETag of the file when it was listed; null on a local disk.", "reading"),
    Column("group", pa.string(), _LISTING, "Group for the rates in the report: the first folders, or an input column."),
    Column("sha256", pa.string(), _READING, "SHA-256 of the encoded image in hex; null if it was not read."),
    Column(
        "bytes",
        pa.int64(),
        ("listing", "reading"),
        "Size of the encoded image; null if it was not read. In the manifest: the listed size, if it is known.",
    ),
    Column("dup_of", pa.string(), _FINALIZING, "`row_id` of the first row, by id, with the same bytes; else null."),
    Column("width", pa.int32(), _READING, "Width in pixels, upright; null if the image was not decoded."),
    Column("height", pa.int32(), _READING, "Height in pixels, upright; null if the image was not decoded."),
    Column("format", pa.string(), _READING, "Format by the first bytes of the file, such as `JPEG`."),
    Column("mode", pa.string(), _READING, "Pillow's pixel mode of the file, such as `RGB`, `L` or `P`."),
    Column("frames", pa.int32(), _READING, "Number of frames; the first one is scored."),
    Column(
        "jpeg_quality",
        pa.int32(),
        _READING,
        "Estimated JPEG quality, 1 to 100; null if the file has no quantization table.",
    ),
    Column("has_exif", pa.bool_(), _READING, "Whether the file has EXIF metadata."),
    Column(
        "status",
        pa.string(),
        ("reading", "scoring", "finalizing"),
        "Outcome for the object: `ok`, `error`, `skipped_duplicate`, `skipped_not_image` or `skipped_sample`.",
    ),
    Column("error_code", pa.string(), ("reading", "scoring"), "Error code if `status` is `error`; else null."),
    Column(
        "error_message",
        pa.string(),
        ("reading", "scoring"),
        "Why there is no score, in a sentence, if `status` is `error` or `skipped_not_image`; else null.",
    ),
    Column("view", pa.large_binary(), _READING, "Pixels of the encoder's view, uint8; null on error.", "scoring"),
    Column("log_likelihood", pa.float32(), _SCORING, "`log_base + log_det`, in nats; null if there is no score."),
    Column("log_base", pa.float32(), _SCORING, "Log-density of the flow's base distribution, in nats."),
    Column("log_det", pa.float32(), _SCORING, "Log-determinant of the flow's Jacobian, in nats."),
    Column(
        "score",
        pa.float32(),
        _SCORING,
        "Sum of the segments' standardised negative log-likelihoods; higher is more suspicious. Do not compare it "
        "across checkpoints.",
    ),
    Column(
        "p_value",
        pa.float32(),
        _SCORING,
        "Conformal p-value among all calibration images, each source weighing the same, or as its weight says; at "
        "least 1 / (n + 1).",
    ),
    Column("stratum", pa.string(), _READING, "Format and class of the longer side, such as `jpeg|512-1024`."),
    Column(
        "p_stratum",
        pa.float32(),
        _SCORING,
        "Conformal p-value among the calibration images of the same stratum; null if there are fewer than 100.",
    ),
    Column("q_value", pa.float32(), _FINALIZING, "Benjamini-Hochberg q-value among the scored rows of the audit."),
    Column("verdict", pa.string(), _FINALIZING, "`likely_ai`, `inconclusive` or `no_ai_signal`; null without a score."),
    Column("verdict_reasons", pa.list_(pa.string()), _FINALIZING, "Reasons for the verdict, as codes."),
    Column("label", pa.string(), _LISTING, "Label that the input gives; else null."),
    Column("generator", pa.string(), _LISTING, "Generator that the input gives; else null."),
    Column("model_id", pa.string(), _FINALIZING, "Id of the flow and its encoder: 16 hex digits."),
    Column("calibration_id", pa.string(), _FINALIZING, "Id of the calibration set: 16 hex digits."),
    Column("precision", pa.string(), _FINALIZING, "Precision of the encoder: `float32` or `bfloat16`."),
    Column("tool_version", pa.string(), _FINALIZING, "Version of clipflow_ray that wrote the row."),
    Column("scored_at", pa.string(), _SCORING, "Time of scoring, ISO 8601 in UTC."),
)
MANIFEST_SCHEMA: Final = pa.schema([(c.name, c.type) for c in COLUMNS if "listing" in c.stages])
LEDGER_SCHEMA: Final = pa.schema([(c.name, c.type) for c in COLUMNS if c.dropped_by is None])
SCORED_SCHEMA: Final = pa.schema(
    [(c.name, c.type) for c in COLUMNS if c.dropped_by is None and c.stages != _FINALIZING]
)


def manifest_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows of the listing -> a table with MANIFEST_SCHEMA.

    Raises ClipflowError if the keys of a row are not exactly the columns of the listing.
    """
    for row in rows:
        _check("The listing", row.keys(), MANIFEST_SCHEMA.names)
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def add_columns(table: pa.Table, stage: Stage, values: Mapping[str, Values]) -> pa.Table:
    """`table` with the columns that `stage` produces, and without those that it drops; NaN and None become null.

    Raises ClipflowError if `values` are not exactly the columns that are listed for `stage`.
    """
    listed = {column.name: column.type for column in COLUMNS if stage in column.stages}
    _check(f"The {stage} stage", values.keys(), listed)
    old = listed.keys() | {column.name for column in COLUMNS if column.dropped_by == stage}
    table = table.drop_columns([name for name in table.column_names if name in old])
    for name, kind in listed.items():
        new = values[name]
        if not isinstance(new, pa.Array | pa.ChunkedArray):
            new = pa.array(new, kind, from_pandas=True)
        table = table.append_column(name, new.cast(kind))
    return table


def scored_table(table: pa.Table) -> pa.Table:
    """`table` with SCORED_SCHEMA, as the scoring stage writes it; raises ClipflowError if its columns are others."""
    _check("A file of scores", table.column_names, SCORED_SCHEMA.names)
    table = table.select(SCORED_SCHEMA.names).replace_schema_metadata(None)
    return table if table.schema.equals(SCORED_SCHEMA) else table.cast(SCORED_SCHEMA)


def ledger_table(table: pa.Table) -> pa.Table:
    """`table` with its columns in the ledger's order; raises ClipflowError if a column is missing or unlisted."""
    _check("The ledger", table.column_names, LEDGER_SCHEMA.names)
    return table.select(LEDGER_SCHEMA.names).cast(LEDGER_SCHEMA)


def _check(producer: str, found: Collection[str], listed: Collection[str]) -> None:
    extra, missing = set(found) - set(listed), set(listed) - set(found)
    if extra or missing:
        problems = [f"has the unlisted {', '.join(sorted(extra))}"] * bool(extra)
        problems += [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
        raise ClipflowError(
            f"{producer} {' and '.join(problems)}. Its columns are listed in columns.py; report this error."
        )
