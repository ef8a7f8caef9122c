"""All figures of an evaluation, computed from the stored per-image scores and the calibration alone.

The table of scores has one row for each image and variant. Its columns are `row_id`, `uri`, `variant`, `group`,
`generated`, the metadata of the file, `score` and `p_value` of the checkpoint (`score_1`, `p_value_1`, ... of the
checkpoints of other seeds), and the suspicion by each available one of BASELINES.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray.config import CAP_PRONE_STRATA, EVALUATED_ALPHAS
from clipflow_ray.evaluate import metrics
from clipflow_ray.evaluate.baselines import BASELINES
from clipflow_ray.evaluate.record import (
    MIN_CELL,
    CellFigures,
    ClassCounts,
    DerivedFigures,
    DetectorFigures,
    Ranking,
    Rate,
    RateTogether,
    RobustnessPoint,
    SourceRate,
    Spread,
    ThresholdFigures,
    VariantFigures,
)
from clipflow_ray.evaluate.views import ALIGNED, AS_FOUND, CASES, VARIANTS
from clipflow_ray.images import stratum
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.statistics import auroc, excess_lower_bound, flagged_rate, wilson

FLOW: Final = "flow"
METADATA_ONLY: Final = "metadata_only"
ORIGINAL: Final = "original"
_P_BINS: Final = 20
# Ranges of the short side in pixels, in words: each begins at its number and ends below the next one's.
_SIZES: Final = {
    0: "below 512 pixels",
    512: "512 to 1023 pixels",
    1024: "1024 to 2047 pixels",
    2048: "2048 pixels and more",
}

Columns = dict[str, NDArray[Any]]
Mask = NDArray[np.bool_]


def columns_of(table: pa.Table, **equal: Any) -> Columns:
    """Return the columns as arrays [N], of the rows in which each named column equals its value."""
    columns: Columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    kept = np.logical_and.reduce([columns[name] == value for name, value in equal.items()])
    return {name: values[kept] for name, values in columns.items()} if equal else columns


def figures(scores: pa.Table, calibrations: Sequence[Calibration], alphas: Sequence[float]) -> DerivedFigures:
    """Return all figures except the robustness curves, with rates at the thresholds of `alphas`.

    `calibrations` are those of the checkpoint, then of the checkpoints of other seeds. `supported` gives the alphas.
    """
    tables = {name: columns_of(scores, variant=name) for name in VARIANTS}
    variants = {name: _variant(rows, calibrations, alphas) for name, rows in tables.items()}
    found, aligned, rows = variants[AS_FOUND], variants[ALIGNED], tables[AS_FOUND]
    return DerivedFigures(
        auroc=found.detectors[FLOW].auroc,
        n=found.n,
        calibration_n=len(calibrations[0].scores),
        calibration_sources=calibrations[0].source_count,
        calibration_in_words=_in_words(calibrations[0], alphas),
        variants=variants,
        by_format=_cells(rows, rows["format"], sorted(set(rows["format"])), calibrations[0], alphas),
        by_size=_cells(rows, sizes(rows["width"], rows["height"]), _SIZES.values(), calibrations[0], alphas),
        metadata_only_auroc=found.metadata_only.auroc,
        format_gap_auroc={name: row.auroc - aligned.detectors[name].auroc for name, row in found.detectors.items()},
    )


def curves(robustness: pa.Table, calibration: Calibration, alphas: Sequence[float]) -> tuple[RobustnessPoint, ...]:
    """Return AUROC, recall and false-positive rate at the fixed thresholds by distortion, the originals first."""
    points = []
    for name, level in ((ORIGINAL, 0.0), *CASES):
        rows = columns_of(robustness, distortion=name, level=level)
        generated, rate = rows["generated"], _rates(rows["score"], calibration)
        points.append(
            RobustnessPoint(
                distortion=name,
                level=level,
                n=_counts(generated),
                auroc=auroc(rows["score"][~generated], rows["score"][generated]),
                tpr={f"{alpha:g}": rate(alpha, generated) for alpha in alphas},
                fpr={f"{alpha:g}": rate(alpha, ~generated) for alpha in alphas},
            )
        )
    return tuple(points)


def supported(calibrations: Sequence[Calibration], asked: float | None) -> list[float]:
    """Return the asked alpha, or else those of EVALUATED_ALPHAS for which every calibration is large enough.

    Raises CalibrationError if a calibration is too small for the asked alpha, or for all of them.
    """
    alphas = (asked,) if asked else EVALUATED_ALPHAS
    enough = [alpha for alpha in alphas if all(each.supports(alpha) for each in calibrations)]
    for calibration in calibrations if not enough else ():
        calibration.threshold(max(alphas))  # raises, and says what to do
    return enough


def sizes(width: NDArray[Any], height: NDArray[Any]) -> NDArray[Any]:
    """Return the range of each image's short side in words, [N]; `width` and `height` are in pixels."""
    starts, names = np.array([*_SIZES]), np.array([*_SIZES.values()])
    named: NDArray[Any] = names[np.searchsorted(starts, np.minimum(width, height), side="right") - 1]
    return named


def _cells(
    rows: Columns, names: NDArray[Any], order: Iterable[str], calibration: Calibration, alphas: Sequence[float]
) -> dict[str, CellFigures]:
    """The flow's figures on the images of each name; `names` [N] are those of the images."""
    masks = {str(name): names == name for name in order}
    return {name: _cell(rows, mask, calibration, alphas) for name, mask in masks.items() if mask.any()}


def _cell(rows: Columns, mask: Mask, calibration: Calibration, alphas: Sequence[float]) -> CellFigures:
    rate, generated = _rates(rows["score"], calibration), rows["generated"]
    natural, positive = mask & ~generated, mask & generated
    pair = rows["score"][natural], rows["score"][positive]
    enough = min(map(len, pair)) >= MIN_CELL
    return CellFigures(
        n=_counts(generated[mask]),
        auroc=auroc(*pair) if enough else None,
        auroc_95=metrics.interval_95(metrics.resampled_auroc(*pair)) if enough else None,
        tpr={f"{alpha:g}": rate(alpha, positive) for alpha in alphas if positive.any()},
        fpr={f"{alpha:g}": rate(alpha, natural) for alpha in alphas if natural.any()},
    )


def _variant(rows: Columns, calibrations: Sequence[Calibration], alphas: Sequence[float]) -> VariantFigures:
    """The figures of one variant: flow and baselines, per generator and per source, and the spread over seeds."""
    generated, calibration = rows["generated"], calibrations[0]
    values = {FLOW: rows["score"]} | {name: rows[name] for name in (*BASELINES, METADATA_ONLY) if name in rows}
    resamples = {name: metrics.resampled_auroc(*_by_class(own, generated)) for name, own in values.items()}
    table = {name: _headline(own, rows, alphas, resamples[name]) for name, own in values.items()}
    metadata_only = table.pop(METADATA_ONLY)
    p_values = rows["p_value"][~generated]
    seeds = [_of_seed(rows[seed_column("score", at)], own, rows, alphas) for at, own in enumerate(calibrations)]
    return VariantFigures(
        n=_counts(generated),
        detectors=table,
        metadata_only=metadata_only,
        comparisons={
            name: metrics.compared(table[FLOW].auroc - row.auroc, resamples[FLOW], resamples[name])
            for name, row in table.items()
            if name != FLOW
        },
        auroc_by_seed=tuple(seed["auroc"] for seed in seeds),
        by_seed=tuple(seeds),
        over_seeds={name: _spread([seed[name] for seed in seeds]) for name in seeds[0]} if len(seeds) > 1 else {},
        thresholds={f"{alpha:g}": _at_threshold(calibration, rows, alpha) for alpha in alphas},
        p_uniformity_on_naturals=metrics.uniformity(p_values),
        p_values_of_naturals=tuple(np.histogram(p_values, bins=_P_BINS, range=(0.0, 1.0))[0].tolist()),
    )


def seed_column(name: str, seed: int) -> str:
    """Return `name` for the checkpoint itself, and `name_1` for the first checkpoint of another seed."""
    return f"{name}_{seed}" if seed else name


def _headline(values: NDArray[Any], rows: Columns, alphas: Sequence[float], resamples: NDArray[Any]) -> DetectorFigures:
    negative, positive = _by_class(values, rows["generated"])
    each = _per_generator(values, rows)
    return DetectorFigures(
        **dict(_ranking(values, rows, each)),
        auroc_95=metrics.interval_95(resamples),
        average_precision=metrics.average_precision(negative, positive),
        oracle_tpr={f"{rate:g}": metrics.oracle_tpr(negative, positive, rate) for rate in alphas},
        per_generator_auroc=each,
    )


def _per_generator(values: NDArray[Any], rows: Columns) -> dict[str, float]:
    """AUROC of each generator against all naturals, worst first."""
    negative = values[~rows["generated"]]
    each = {name: auroc(negative, values[mask]) for name, mask in _groups(rows, rows["generated"])}
    return dict(sorted(each.items(), key=lambda item: item[1]))


def _ranking(values: NDArray[Any], rows: Columns, per_generator: dict[str, float]) -> Ranking:
    generated, ordered = rows["generated"], list(per_generator.values())
    return Ranking(
        auroc=auroc(values[~generated], values[generated]),
        macro_auroc=float(np.mean(ordered)),
        worst_quartile_auroc=float(np.mean(ordered[: max(1, len(ordered) // 4)])),
    )


def _of_seed(
    scores: NDArray[Any], calibration: Calibration, rows: Columns, alphas: Sequence[float]
) -> dict[str, float]:
    """The figures whose spread over seeds is reported."""
    generated, rate = rows["generated"], _rates(scores, calibration)
    result = _ranking(scores, rows, _per_generator(scores, rows)).model_dump()
    for alpha in alphas:
        result |= {f"tpr_{alpha:g}": rate(alpha, generated).rate, f"fpr_{alpha:g}": rate(alpha, ~generated).rate}
    return result


def _spread(values: list[float]) -> Spread:
    return Spread(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)), min=min(values), max=max(values))


def _at_threshold(calibration: Calibration, rows: Columns, alpha: float) -> ThresholdFigures:
    """Rates at the calibrated threshold: recall per generator, false positives per natural source."""
    generated, rate = rows["generated"], _rates(rows["score"], calibration)
    true, false = rate(alpha, generated), rate(alpha, ~generated)
    threshold, rule = calibration.threshold(alpha), calibration.rule(alpha, CAP_PRONE_STRATA)
    capped = (rows["score"] > threshold) & np.isin(_strata(rows), sorted(rule.prone))
    together = flagged_rate(true.flagged + false.flagged, len(generated), alpha)
    return ThresholdFigures(
        threshold=threshold,
        tpr=true,
        fpr=false,
        balanced_accuracy=0.5 * (true.rate + 1.0 - false.rate),
        false_positive_rate_95=calibration.false_positive_interval(alpha),
        unseen_source=calibration.unseen_source(alpha),
        prone_strata=tuple(sorted(rule.prone)),
        capped=ClassCounts(natural=int((capped & ~generated).sum()), generated=int((capped & generated).sum())),
        audited_together=RateTogether(**dict(together), generated_share=float(generated.mean())),
        per_generator={name: rate(alpha, mask) for name, mask in _groups(rows, generated)},
        per_source={
            name: _of_source(rate(alpha, mask), calibration, alpha) for name, mask in _groups(rows, ~generated)
        },
    )


def _of_source(rate: Rate, calibration: Calibration, alpha: float) -> SourceRate:
    low, high = calibration.flagged_interval(alpha, rate.of)
    unseen = calibration.unseen_source(alpha)
    return SourceRate(
        **dict(rate),
        expected_95=(low, high),
        inside=low <= rate.rate <= high,
        inside_unseen=None if unseen is None else unseen.low <= rate.rate <= unseen.high,
        excess_lower_bound=excess_lower_bound(rate.wilson_95[0], alpha),
    )


def _rates(scores: NDArray[Any], calibration: Calibration) -> Callable[[float, Mask], Rate]:
    """Return a function (alpha, mask) -> rate of the masked images that are flagged at alpha."""

    def rate(alpha: float, mask: Mask) -> Rate:
        count, of = int((scores[mask] > calibration.threshold(alpha)).sum()), int(mask.sum())
        return Rate(flagged=count, of=of, rate=count / of, wilson_95=wilson(count, of))

    return rate


def _in_words(calibration: Calibration, alphas: Sequence[float]) -> tuple[str, ...]:
    """The sentences of every alpha, each once."""
    each = (calibration.in_words(a) + calibration.rule(a, CAP_PRONE_STRATA).in_words() for a in alphas)
    return tuple(dict.fromkeys(sentence for sentences in each for sentence in sentences))


def _strata(rows: Columns) -> NDArray[np.str_]:
    """The stratum of format and size of each image."""
    files = zip(rows["format"], rows["width"], rows["height"], strict=True)
    return np.array([stratum(str(kind), int(width), int(height)) for kind, width, height in files], np.str_)


def _by_class(values: NDArray[Any], generated: Mask) -> tuple[NDArray[Any], NDArray[Any]]:
    """The values of the natural images, and those of the generated ones."""
    return values[~generated], values[generated]


def _groups(rows: Columns, mask: Mask) -> list[tuple[str, Mask]]:
    return [(str(name), mask & (rows["group"] == name)) for name in np.unique(rows["group"][mask])]


def _counts(generated: Mask) -> ClassCounts:
    return ClassCounts(natural=int((~generated).sum()), generated=int(generated.sum()))
