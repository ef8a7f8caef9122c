"""The models of `figures.json`, and of `run.json` in the two runs that hold an evaluation's embeddings."""

from typing import Final, Literal

from pydantic import Field

from clipflow_ray.config import Closed, InventoryOptions, Record, Segment
from clipflow_ray.model.calibration import SourceRange
from clipflow_ray.runs.record import FinishedRecord
from clipflow_ray.statistics import FlaggedRate

MIN_CELL: Final = 10  # with fewer images of a class, an AUROC says nothing
Outcome = Literal["higher", "lower", "no difference beyond the noise"]


class ClassCounts(Closed):
    """Number of images of each class."""

    natural: int = Field(description="Natural images.")
    generated: int = Field(description="AI-generated images.")


class Ranking(Closed):
    """How well scores rank generated images above natural ones."""

    auroc: float = Field(description="AUROC over all images.")
    macro_auroc: float = Field(description="Mean AUROC over generators, each against all natural images.")
    worst_quartile_auroc: float = Field(description="Mean AUROC of the lowest quarter of the generators.")


class DetectorFigures(Ranking):
    """The figures of one detector that need no threshold."""

    auroc_95: tuple[float, float] = Field(description="95 % bootstrap interval of `auroc`.")
    average_precision: float = Field(description="Average precision, with both classes weighted alike.")
    oracle_tpr: dict[str, float] = Field(
        description="Recall at a false-positive rate, with a threshold that is set on the evaluated images themselves."
    )
    per_generator_auroc: dict[str, float] = Field(description="AUROC of each generator, worst first.")


class Comparison(Closed):
    """The flow against one baseline on the same images."""

    auroc_difference: float = Field(description="AUROC of the flow minus AUROC of the baseline.")
    difference_95: tuple[float, float] = Field(
        description="95 % interval of `auroc_difference`: a bootstrap that draws the same images for both."
    )
    outcome: Outcome = Field(description="The flow's AUROC: `higher` or `lower` if `difference_95` leaves out 0.")


class Rate(Closed):
    """Number and share of the images of one kind that are flagged at a fixed threshold."""

    flagged: int = Field(description="Flagged images.")
    of: int = Field(description="Images of that kind.")
    rate: float = Field(description="`flagged / of`.")
    wilson_95: tuple[float, float] = Field(description="95 % Wilson interval of `rate`.")


class SourceRate(Rate):
    """The false positives of one natural source."""

    expected_95: tuple[float, float] = Field(
        description="Range of 95 % of samples of that size, if the source is like the calibration photographs."
    )
    inside: bool = Field(description="Whether `rate` lies in `expected_95`.")
    inside_unseen: bool | None = Field(
        None, description="Whether `rate` lies in the 90 % range of `unseen_source`; null if that is null."
    )
    excess_lower_bound: float = Field(
        description="`(low - alpha) / (1 - alpha)`, at least 0; low is the lower end of `wilson_95`."
    )


class RateTogether(FlaggedRate):
    """The figures that an audit of both classes together would report if it caps no verdict."""

    generated_share: float = Field(description="Share of AI-generated images in both classes together.")


class ThresholdFigures(Closed):
    """Rates at the calibrated threshold of one alpha."""

    threshold: float = Field(description="Images with a higher score are flagged.")
    tpr: Rate = Field(description="Recall of the generated images.")
    fpr: Rate = Field(description="False positives among the natural images.")
    balanced_accuracy: float = Field(description="Mean of recall and of one minus the false-positive rate.")
    false_positive_rate_95: tuple[float, float] = Field(
        description="95 % interval of the false-positive rate on photographs drawn as the calibration's were."
    )
    unseen_source: SourceRange | None = Field(
        None, description="Flagged share of a source never seen; null if the calibration knows fewer than 5 sources."
    )
    prone_strata: tuple[str, ...] = Field(
        (), description="Strata of format and size that calibration flags at least three times as often as alpha."
    )
    capped: ClassCounts = Field(
        description="Flagged images of these strata, on which a verdict is at most `inconclusive` by default."
    )
    audited_together: RateTogether = Field(description="The flagged share of both classes together.")
    per_generator: dict[str, Rate] = Field(description="Recall of each generator.")
    per_source: dict[str, SourceRate] = Field(description="False positives of each natural source.")


class Spread(Closed):
    """Spread of one figure over checkpoints of several seeds."""

    mean: float = Field(description="Mean over the seeds.")
    std: float = Field(description="Standard deviation over the seeds.")
    min: float = Field(description="Lowest value.")
    max: float = Field(description="Highest value.")


class Uniformity(Closed):
    """Distance of p-values from the uniform distribution."""

    ks_distance: float = Field(description="Kolmogorov-Smirnov distance from the uniform distribution.")
    p: float = Field(description="p-value of that distance.")


class CellFigures(Closed):
    """The flow's figures on the images of one file format, or of one range of sizes."""

    n: ClassCounts = Field(description="Readable images.")
    auroc: float | None = Field(description=f"AUROC; null if a class has fewer than {MIN_CELL} images.")
    auroc_95: tuple[float, float] | None = Field(description="95 % bootstrap interval of `auroc`, or null.")
    tpr: dict[str, Rate] = Field(description="Recall, by alpha; empty without generated images.")
    fpr: dict[str, Rate] = Field(description="False positives, by alpha; empty without natural images.")


class VariantFigures(Closed):
    """All figures of one variant of the images: as found, format-aligned, or recompressed."""

    n: ClassCounts = Field(description="Readable images.")
    detectors: dict[str, DetectorFigures] = Field(description="The flow, and each baseline on the same embeddings.")
    metadata_only: DetectorFigures = Field(
        description="A probe on format, size, aspect and bytes per pixel alone, trained on the labels."
    )
    comparisons: dict[str, Comparison] = Field(description="The flow against each baseline.")
    auroc_by_seed: tuple[float, ...] = Field(description="AUROC of the flow of each seed.")
    by_seed: tuple[dict[str, float], ...] = Field(description="Figures of the flow of each seed, by name.")
    over_seeds: dict[str, Spread] = Field(description="Spread of the figures of `by_seed`; empty with one seed.")
    thresholds: dict[str, ThresholdFigures] = Field(description="Rates at each alpha's threshold, by alpha.")
    p_uniformity_on_naturals: Uniformity = Field(description="Distance of the natural images' p-values from uniform.")
    p_values_of_naturals: tuple[int, ...] = Field(description="Natural images by p-value, in 20 equal bins.")


class RobustnessPoint(Closed):
    """The figures of one distortion at one level."""

    distortion: str = Field(description="Name of the distortion, or `original`.")
    level: float = Field(description="Level of the distortion; 0 for `original`.")
    n: ClassCounts = Field(description="Distorted images.")
    auroc: float = Field(description="AUROC of the flow.")
    tpr: dict[str, Rate] = Field(description="Recall at each fixed threshold, by alpha.")
    fpr: dict[str, Rate] = Field(description="False positives at each fixed threshold, by alpha.")


class DerivedFigures(Closed):
    """All figures that are computed from the table of scores and the calibrations."""

    auroc: float = Field(description="AUROC of the flow on the images as found.")
    n: ClassCounts = Field(description="Readable images.")
    calibration_n: int = Field(description="Number of calibration photographs.")
    calibration_sources: int = Field(1, description="Number of their sources; 1 if the checkpoint does not know them.")
    calibration_in_words: tuple[str, ...] = Field(
        (), description="What each alpha and a p-value mean with this calibration, as sentences."
    )
    variants: dict[str, VariantFigures] = Field(
        description="The figures of `as_found`, `format_aligned` and `recompressed`."
    )
    by_format: dict[str, CellFigures] = Field(description="Figures of the images as found, by file format.")
    by_size: dict[str, CellFigures] = Field(
        description="Figures of the images as found, by the range of the short side, smallest first."
    )
    metadata_only_auroc: float = Field(description="AUROC of the `metadata_only` probe on the images as found.")
    format_gap_auroc: dict[str, float] = Field(
        description="AUROC as found minus AUROC format-aligned, of each detector."
    )


class EvaluationFigures(DerivedFigures, Record):
    """`figures.json`, and what `evaluate --json` prints."""

    disclaimer: str = Field(description="What a score is and is not.")
    model_id: str = Field(description="Id of the checkpoint.")
    calibration_id: str = Field(description="Id of the checkpoint's calibration.")
    seed_model_ids: tuple[str, ...] = Field(description="Ids of the checkpoints of other seeds.")
    natural: tuple[str, ...] = Field(description="URIs of the natural inputs.")
    generated: tuple[str, ...] = Field(description="URIs of the generated inputs.")
    unreadable: int = Field(description="Images that could not be read.")
    unreadable_by_code: dict[str, int] = Field(description="Images that could not be read, by error code.")
    robustness: tuple[RobustnessPoint, ...] = Field(
        description="Figures of distorted images, the originals first; empty if none were asked for."
    )


class VariantsIdentity(Closed):
    """All settings that affect the embeddings of the images in every variant."""

    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    segments: tuple[Segment, ...] = Field(description="Outputs of the encoder that are stored.")
    natural: tuple[str, ...] = Field(description="URIs of the natural inputs.")
    generated: tuple[str, ...] = Field(description="URIs of the generated inputs.")
    inventory: InventoryOptions = Field(description="How the inputs are read.")
    listing: str = Field(description="Hash of the listed objects.")
    variants: tuple[str, ...] = Field(description="Names of the variants.")


class DistortionsIdentity(Closed):
    """All settings that affect the embeddings of the distorted images."""

    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    segments: tuple[Segment, ...] = Field(description="Outputs of the encoder that are stored.")
    listing: str = Field(description="Hash of the listed objects.")
    cases: tuple[str, ...] = Field(description="Name and level of each distortion.")
    draws: dict[str, int] = Field(description="Random draw of each distorted image, by row id.")


class VariantsRecord(FinishedRecord[VariantsIdentity]):
    """`run.json` of finished embeddings of all variants."""


class DistortionsRecord(FinishedRecord[DistortionsIdentity]):
    """`run.json` of finished embeddings of the distorted images."""
