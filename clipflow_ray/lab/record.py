"""What an experiment keeps and says: a row for each fit, and a line for each candidate."""

from pydantic import Field

from clipflow_ray.config import Closed


class HeldOutFigures(Closed):
    """The figures of one fit on the family that it did not see; all None if it failed."""

    auroc: float | None = Field(None, description="AUROC on the held-out family.")
    tpr_5: float | None = Field(None, description="Recall of the held-out family at the calibrated 5 %.")
    auroc_sources: float | None = Field(
        None, description="AUROC between natural sources; null with fewer than two large ones."
    )
    nll_median: float | None = Field(None, description="Median of the natural images' negative log-likelihood.")
    auroc_seen: float | None = Field(None, description="AUROC on the families that it trained on.")
    error: str | None = Field(None, description="Why the fit failed.")


class FitRow(HeldOutFigures):
    """One row of `results.parquet`, and one file of finished fits."""

    key: str = Field(description="Hash of all that shapes the fit.")
    candidate: str = Field(description="Name of the candidate.")
    held_out: str = Field(description="Proxy family that the fit did not see.")
    seed: int = Field(description="Seed of the fit.")


class CandidateLine(Closed):
    """What the fits of one candidate add up to; one with a failed fit has `failed` and no figures."""

    candidate: str = Field(description="Name of the candidate.")
    fits: int = Field(description="Number of fits.")
    failed: str | None = Field(description="Why a fit failed.")
    auroc: float | None = Field(None, description="Mean over held-out families and seeds.")
    tpr_5: float | None = Field(None, description="Mean recall at the calibrated 5 %.")
    auroc_sources: float | None = Field(None, description="Mean AUROC between natural sources.")
    nll_median: float | None = Field(None, description="Mean of the median negative log-likelihoods.")
    auroc_seen: float | None = Field(None, description="Mean AUROC on the families that were trained on.")
    auroc_sd: float | None = Field(None, description="Standard deviation of `auroc` over seeds; null with one seed.")
    worst: str | None = Field(None, description="Family with the lowest mean over seeds.")
    worst_auroc: float | None = Field(None, description="That mean.")
    families: dict[str, float] = Field({}, description="Mean over seeds of each held-out family.")


class ExperimentResult(Closed):
    """Where the table and the page lie, and a line for each candidate, best first."""

    results: str = Field(description="URI of `results.parquet`.")
    page: str = Field(description="URI of `experiment.html`.")
    summary: tuple[CandidateLine, ...] = Field(description="One line for each candidate, best first.")
