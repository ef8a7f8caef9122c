"""The models of an experiment's results: a row for each fit and a line for each candidate."""

from pydantic import Field

from clipflow_ray.config import Closed


class HeldOutFigures(Closed):
    """The figures of one fit; all are None if it failed."""

    auroc: float | None = Field(None, description="AUROC on the held-out family.")
    tpr_5: float | None = Field(None, description="Recall of the held-out family at the calibrated 5 %.")
    auroc_sources: float | None = Field(
        None, description="AUROC between natural sources; null with fewer than two large ones."
    )
    nll_median: float | None = Field(None, description="Median of the natural images' negative log-likelihood.")
    auroc_seen: float | None = Field(None, description="AUROC on the families that train.")
    error: str | None = Field(None, description="Why the fit failed.")


class FitRow(HeldOutFigures):
    """One row of `results.parquet`, and one file of finished fits."""

    key: str = Field(description="Hash of all settings that affect the fit.")
    candidate: str = Field(description="Name of the candidate.")
    held_out: str = Field(description="Proxy family that did not train.")
    seed: int = Field(description="Seed of the fit.")


class CandidateLine(Closed):
    """Mean figures over the fits of one candidate. If a fit failed, `failed` is set and the figures are missing."""

    candidate: str = Field(description="Name of the candidate.")
    fits: int = Field(description="Number of fits.")
    failed: str | None = Field(description="Why a fit failed.")
    auroc: float | None = Field(None, description="Mean over held-out families and seeds.")
    tpr_5: float | None = Field(None, description="Mean recall at the calibrated 5 %.")
    auroc_sources: float | None = Field(None, description="Mean AUROC between natural sources.")
    nll_median: float | None = Field(None, description="Mean of the median negative log-likelihoods.")
    auroc_seen: float | None = Field(None, description="Mean AUROC on the families that train.")
    auroc_sd: float | None = Field(None, description="Standard deviation of `auroc` over seeds; null with one seed.")
    worst: str | None = Field(None, description="Family with the lowest mean over seeds.")
    worst_auroc: float | None = Field(None, description="Mean AUROC of the family `worst`.")
    families: dict[str, float] = Field({}, description="Mean over seeds of each held-out family.")


class ExperimentResult(Closed):
    """URIs of the table and of the page, and a line for each candidate."""

    results: str = Field(description="URI of `results.parquet`.")
    page: str = Field(description="URI of `experiment.html`.")
    summary: tuple[CandidateLine, ...] = Field(description="One line for each candidate, best first.")
