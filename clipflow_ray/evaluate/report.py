"""The page of an evaluation: one self-contained HTML file with every figure, charts and the worst errors.

The page is made from the per-image scores and the figures. Only the gallery's thumbnails are read from the inputs.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from sklearn.metrics import roc_curve

from clipflow_ray.config import EvaluateConfig, ImageLimits
from clipflow_ray.evaluate.figures import FLOW, METADATA_ONLY, ORIGINAL, Columns, columns_of
from clipflow_ray.evaluate.record import (
    MIN_CELL,
    EvaluationFigures,
    RobustnessPoint,
    ThresholdFigures,
    VariantFigures,
)
from clipflow_ray.evaluate.views import ALIGNED, AS_FOUND, DISTORTIONS, VARIANTS
from clipflow_ray.place import Place
from clipflow_ray.reports import pages
from clipflow_ray.reports.pages import Picture
from clipflow_ray.runs.folder import Run

_BINS: Final = 30
_LINES: Final[dict[str, tuple[str, Any]]] = {
    FLOW: (pages.SUSPICIOUS_COLOUR, "-"),
    "mahalanobis": ("#4c8fd6", "--"),
    "knn": ("#2fa36b", "-."),
    "natural_only_flow": ("#c08a1e", ":"),
    "logistic_probe": ("#8f6fd1", (0, (5, 1))),
    "mlp_probe": ("#3aa6a6", (0, (1, 1))),
    METADATA_ONLY: (pages.GREY, (0, (3, 3))),
}
_AXES: Final = {
    "jpeg": "JPEG quality",
    "webp": "WebP quality",
    "resize": "resize, factor on each side",
    "crop": "crop, share of each side",
    "blur": "Gaussian blur, pixels",
    "web": "long edge 768, then JPEG quality",
}


def write_page(
    config: EvaluateConfig, run: Run, scores: pa.Table, result: EvaluationFigures, limits: ImageLimits
) -> None:
    """Write `report.html` below the output. `run` lists the images, `result` are the figures."""
    variants = {name: columns_of(scores, variant=name) for name in VARIANTS}
    found = result.variants[AS_FOUND]
    alpha = max(found.thresholds, key=float)
    threshold = found.thresholds[alpha].threshold
    template = pages.environment("clipflow_ray.evaluate").get_template("report.html.j2")
    text = template.render(
        result=result,
        found=found,
        titles={name: name.replace("_", "-" if name == ALIGNED else " ") for name in VARIANTS},
        alpha=alpha,
        min_cell=MIN_CELL,
        charts=[_charts(name, rows, result.variants[name]) for name, rows in variants.items()],
        p_value_chart=pages.p_value_chart(found.p_values_of_naturals),
        curves=_curves(result.robustness, alpha) if result.robustness else [],
        axes=_AXES,
        gallery=_gallery(config, run, variants[AS_FOUND], threshold, limits) if config.gallery else {},
        tables=["scores", "calibration", *(["robustness"] if result.robustness else [])],
    )
    (Place.at(config.output, config.s3) / "report.html").write(text)


def _charts(variant: str, rows: Columns, figures: VariantFigures) -> list[dict[str, str]]:
    """ROC curves and score histograms of one variant: each has an `svg` and a `label` for screen readers."""
    title = variant.replace("_", " ")
    table = {**figures.detectors, METADATA_ONLY: figures.metadata_only}
    values = ", ".join(f"{name.replace('_', ' ')} {row.auroc:.3f}" for name, row in table.items())
    natural, generated = (np.median(rows["score"][mask]) for mask in (~rows["generated"], rows["generated"]))
    return [
        {"svg": _roc(title, rows, list(table)), "label": f"ROC curves, {title}. AUROC: {values}."},
        {
            "svg": _histogram(title, rows, figures.thresholds),
            "label": f"Histogram of scores, {title}: median {natural:.3f} of natural and {generated:.3f} of "
            "generated images; vertical lines are the fixed thresholds.",
        },
    ]


def _roc(title: str, rows: Columns, names: list[str]) -> str:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=pages.GREY, linewidth=0.6)
        for name in names:
            colour, line = _LINES[name]
            false, true, _ = roc_curve(rows["generated"], rows["score" if name == FLOW else name])
            width = 2.2 if name == FLOW else 1.2
            axes.plot(false, true, color=colour, linestyle=line, linewidth=width, label=name.replace("_", " "))
        axes.set(title=title, xlabel="false-positive rate", ylabel="true-positive rate", xlim=(0, 1), ylim=(0, 1.01))
        axes.legend(frameon=False, loc="lower right", fontsize="small")

    return pages.chart(draw, (5.0, 4.2))


def _histogram(title: str, rows: Columns, thresholds: dict[str, ThresholdFigures]) -> str:
    def draw(axes: Any) -> None:
        low, high = np.quantile(rows["score"], [0.01, 0.97])
        edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
        for name, mask in (("natural", ~rows["generated"]), ("generated", rows["generated"])):
            counts = np.histogram(np.clip(rows["score"][mask], edges[0], edges[-1]), bins=edges)[0]
            if name == "natural":
                style: dict[str, Any] = {"fill": True, "color": pages.NATURAL_COLOUR, "alpha": 0.6}
            else:
                style = {"color": pages.SUSPICIOUS_COLOUR, "linewidth": 2}
            axes.stairs(counts / mask.sum(), edges, label=name, **style)
        for alpha, at in thresholds.items():
            if edges[0] <= at.threshold <= edges[-1]:
                axes.axvline(at.threshold, color=pages.GREY, linestyle="--", linewidth=1)
                place = (at.threshold, 0.98)
                axes.annotate(alpha, place, xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
        axes.set(title=title, xlabel="score (the end bins include scores beyond the axis)", ylabel="share of the class")
        axes.legend(frameon=False, loc="center right")

    return pages.chart(draw, (5.0, 4.2))


def _curves(points: Sequence[RobustnessPoint], alpha: str) -> list[dict[str, str]]:
    """One chart for each kind of distortion: AUROC above, false-positive rate at `alpha` below, by level."""
    result = []
    for name in DISTORTIONS:
        own = [point for point in points if point.distortion in (ORIGINAL, name)]
        values = "; ".join(
            f"{level_of(point)}: AUROC {point.auroc:.3f}, false positives {point.fpr[alpha].rate:.3f}" for point in own
        )
        result.append({"svg": _curve(own, name, alpha), "label": f"{_AXES[name]}. {values}."})
    return result


def _curve(points: Sequence[RobustnessPoint], name: str, alpha: str) -> str:
    def draw(axes: Any) -> None:
        upper, lower = axes
        x = np.arange(len(points))
        rates = [point.fpr[alpha] for point in points]
        upper.plot(x, [point.auroc for point in points], "o-", color=pages.SUSPICIOUS_COLOUR)
        upper.axhline(0.5, color=pages.GREY, linewidth=0.6)
        upper.set(ylabel="AUROC", ylim=(0.35, 1.02))
        lower.plot(x, [row.rate for row in rates], "o-", color="#4c8fd6")
        lower.vlines(x, *zip(*(row.wilson_95 for row in rates), strict=True), color="#4c8fd6", linewidth=1)
        lower.axhline(float(alpha), color=pages.GREY, linestyle="--", linewidth=1)
        lower.set(ylabel="false positives", xlabel=_AXES[name], ylim=(0, None), xticks=x)
        lower.set_xticklabels([level_of(point) for point in points])

    return pages.chart(draw, (4.2, 4.0), rows=2)


def level_of(point: RobustnessPoint) -> str:
    """Return the level of a robustness point as the page shows it."""
    return ORIGINAL if point.distortion == ORIGINAL else f"{point.level:g}"


def _gallery(
    config: EvaluateConfig, run: Run, rows: Columns, threshold: float, limits: ImageLimits
) -> dict[str, list[Picture]]:
    """Up to `config.gallery` errors of each kind at `threshold`, worst first."""
    flagged = rows["score"] > threshold
    order = np.argsort(rows["score"], kind="stable")
    kinds = {
        "Natural images that were flagged, highest score first": order[::-1][
            (flagged & ~rows["generated"])[order[::-1]]
        ],
        "Generated images that were missed, lowest score first": order[(~flagged & rows["generated"])[order]],
    }

    def picture(at: int) -> Picture:
        row = {name: rows[name][at] for name in ("row_id", "uri", "member", "score", "p_value")}
        return Picture(**row, note=rows["group"][at])

    return {
        title: pages.pictured(run, [picture(at) for at in chosen[: config.gallery]], limits, config.inventory)
        for title, chosen in kinds.items()
    }
