"""The JSON of an audit: `run.json`, `report.json`, and the plan that `--dry-run` prints."""

from typing import Literal

from pydantic import Field

from clipflow_ray.config import AuditConfig, Closed, ImageLimits, InventoryOptions, Precision, Record
from clipflow_ray.model.calibration import SourceRange
from clipflow_ray.runs.record import FinishedRecord
from clipflow_ray.statistics import FlaggedRate


class AuditIdentity(Closed):
    """Everything that determines the scores of an audit. An output accepts no audit of another identity."""

    input: tuple[str, ...] = Field(description="URIs of the inputs.")
    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    precision: Precision = Field("float32", description="Precision of the encoder.")
    inventory: InventoryOptions = Field(description="How the inputs are read.")
    limits: ImageLimits = Field(description="Limits of size and time for the decoding of an image.")
    sample: float = Field(description="Share of the objects that are scored.")
    model_id: str = Field(description="Id of the checkpoint.")
    calibration_id: str = Field(description="Id of the calibration.")
    tool_version: str = Field(description="Version of this package.")
    keep_embeddings: bool = Field(False, description="Whether the embeddings are stored.")
    rescored_from: str | None = Field(
        None, description="URI of the audit whose embeddings were scored; null if images were read."
    )


class Timing(Closed):
    """Duration of the scoring since the last start of the run."""

    seconds: float = Field(description="Wall-clock seconds, including the start of the workers.")
    objects: int = Field(description="Objects that were processed in this time.")
    objects_per_second: float = Field(description="`objects / seconds`.")


class CalibrationCard(Closed):
    """What alpha means with the calibration of the checkpoint."""

    calibration_n: int = Field(description="Number of calibration photographs.")
    calibration_sources: int = Field(1, description="Number of their sources; 1 if the checkpoint does not know them.")
    threshold: float = Field(description="A higher score has a p-value of at most alpha.")
    p_floor: float | None = Field(
        None, description="The smallest p-value that there is, 1 / (n + 1); null in an older record."
    )
    false_positive_rate_95: tuple[float, float] = Field(
        description="95 % interval of the false-positive rate on photographs drawn as the calibration's were."
    )
    unseen_source: SourceRange | None = Field(
        None, description="Flagged share of a source never seen; null if the calibration knows fewer than 5 sources."
    )
    prone_strata: tuple[str, ...] = Field(
        (), description="Strata of format and size that calibration flags at least three times as often as alpha."
    )
    in_words: tuple[str, ...] = Field((), description="The same as sentences.")


class Judged(Closed):
    """Totals over the rows of the ledger, at one alpha."""

    rows: int = Field(description="Rows of the ledger, one for each listed object.")
    by_status: dict[str, int] = Field(description="Rows by `status`.")
    by_error_code: dict[str, int] = Field(description="Rows that have an `error_code`, by its value.")
    by_verdict: dict[str, int] = Field(description="Rows that have a `verdict`, by its value.")
    capped: int = Field(
        0, description="Rows with a p-value of at most alpha that are `inconclusive` because their stratum is prone."
    )
    flagged: FlaggedRate = Field(description="How many of the scored images are flagged.")


class AuditRecord(Judged, FinishedRecord[AuditIdentity]):
    """`run.json` of a finished audit, and what `audit --json` prints."""

    config: AuditConfig = Field(description="Settings of the `audit` command; `finalize` does not change them.")
    timing: Timing = Field(description="How long the scoring took.")
    alpha: float = Field(description="False-positive rate that the verdicts are for.")
    cap_prone_strata: bool = Field(
        False, description="Whether the verdict on an image of a prone stratum is at most `inconclusive`."
    )
    dedupe: Literal["sha256", "none"] = Field(description="Whether equal files count once.")
    calibration: CalibrationCard = Field(description="What alpha means with this calibration.")
    ledger: str = Field(description="URI of the folder with the ledger's parquet files.")
    report: str = Field(description="URI of the report's page.")
    exported: str | None = Field(None, description="URI of the csv file of `--export`; null if there is none.")

    @property
    def error_rate(self) -> float:
        """Share of errors among the objects that are images or call themselves so, and are in the sample."""
        counts = self.by_status
        read = counts.get("error", 0) + counts.get("ok", 0) + counts.get("skipped_duplicate", 0)
        return counts.get("error", 0) / read if read else 0.0


class AuditPlan(Closed):
    """What `audit --dry-run` prints: the amount of work, and its duration at the speed of one batch."""

    objects: int = Field(description="Listed objects.")
    to_score: int = Field(description="Objects in the sample, without those that are known to be no images.")
    bytes: int = Field(
        description="Total bytes of the listed objects; an object whose size the listing does not give counts 0."
    )
    by_suffix: dict[str, int] = Field(description="Objects by the suffix of their names, most frequent first.")
    precision: Precision = Field(description="Precision that the encoders would compute in.")
    encoders: int = Field(description="Encoders at the start; an autoscaler may add more.")
    images_per_second: float = Field(description="Speed of these encoders, measured on one batch.")
    hours: float = Field(description="`to_score` at that speed, in hours.")


class ReportCard(Closed):
    """Inputs, checkpoint and settings of the audit."""

    input: tuple[str, ...] = Field(description="URIs of the inputs.")
    checkpoint: str = Field(description="Id of the checkpoint.")
    calibration: str = Field(description="Id of the calibration.")
    calibration_n: int = Field(description="Number of calibration photographs.")
    alpha: float = Field(description="False-positive rate that the verdicts are for.")
    false_positive_rate_95: tuple[float, float] = Field(
        description="95 % interval of the false-positive rate on photographs like those of the calibration."
    )
    tool_version: str = Field(description="Version of this package.")
    encoder: str = Field(description="Fingerprint of the encoder.")
    precision: Precision = Field(description="Precision of the encoder.")
    sample: float = Field(description="Share of the objects that were scored.")
    dedupe: Literal["sha256", "none"] = Field(description="Whether equal files count once.")


class Counts(Closed):
    """Numbers of rows of the ledger."""

    status: dict[str, int] = Field(description="Rows by `status`.")
    verdict: dict[str, int] = Field(description="Rows that have a `verdict`, by its value.")
    error_code: dict[str, int] = Field(description="Rows that have an `error_code`, by its value.")
    rows: int = Field(description="All rows.")


class NamedRate(FlaggedRate):
    """The rate of one group, or of one stratum of format and size."""

    name: str = Field(description="Name of the group or of the stratum.")
    q: float = Field(description="Benjamini-Hochberg adjusted p-value of the test whether the rate exceeds alpha.")
    marked: bool = Field(description="Whether the rate exceeds alpha at a false-discovery rate of 5 %.")


class ErrorExample(Closed):
    """One object that could not be scored."""

    place: str = Field(description="URI of the object, and its name within a container.")
    message: str = Field(description="Why it could not be scored.")


class ErrorGroup(Closed):
    """The objects that share one error code."""

    count: int = Field(description="Number of objects.")
    examples: tuple[ErrorExample, ...] = Field(description="The first few of them.")


class ScoreHistogram(Closed):
    """Shares of images by score, in bins over most of the calibration scores; the end bins hold all scores beyond."""

    edges: tuple[float, ...] = Field(description="Edges of the bins, one more than there are bins.")
    audit: tuple[float, ...] = Field(description="Share of the audit's scored images in each bin.")
    calibration: tuple[float, ...] = Field(description="Share of the calibration photographs in each bin.")


class Drift(Closed):
    """How far the audit's scores lie from those of the calibration."""

    ks_distance: float = Field(description="Kolmogorov-Smirnov distance of the two distributions.")
    p_value: float = Field(description="Asymptotic p-value of that distance.")
    median: float = Field(description="Median score of the audit, within half a percent.")
    calibration_median: float = Field(description="Median score of the calibration.")
    unlike: bool = Field(
        description="Whether the distance is at least 0.25 and `p_value` at most 0.001: calibrate on your own."
    )


class AuditReport(Record):
    """`report.json`: the facts that the report's page shows."""

    disclaimer: str = Field(description="What a score is and is not.")
    card: ReportCard = Field(description="Inputs, checkpoint and settings.")
    command: str = Field(description="Command line that repeats the audit.")
    counts: Counts = Field(description="Rows of the ledger by status, verdict and error code.")
    timing: Timing = Field(description="How long the scoring took.")
    calibration: CalibrationCard = Field(description="What alpha means with this calibration.")
    capped: int = Field(description="Images that would be flagged, but are `inconclusive` as their stratum is prone.")
    flagged: FlaggedRate = Field(description="How many of the scored images are flagged.")
    groups: tuple[NamedRate, ...] = Field(description="Rates of the groups, most flagged first.")
    strata: tuple[NamedRate, ...] = Field(description="Rates of the strata of format and size, most flagged first.")
    errors: dict[str, ErrorGroup] = Field(description="Objects that could not be scored, by error code.")
    scores: ScoreHistogram = Field(description="Histogram of the scores beside that of the calibration.")
    p_values: tuple[int, ...] = Field(description="Scored images by p-value, in 20 equal bins from 0 to 1.")
    drift: Drift | None = Field(description="Distance from the calibration; null if no image was scored.")
