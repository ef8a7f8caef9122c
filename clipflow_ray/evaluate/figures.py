"""All figures of an evaluation, computed from the stored per-image scores and the calibration alone.

The table of scores has one row for each image and variant. Its columns are `row_id`, `uri`, `variant`, `group`,
`generated`, the metadata of the file, `score` and `p_value` of the checkpoint (`score_1`, `p_value_1`, ... of the
checkpoints of other seeds), and the suspicion by each available one of BASELINES.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray.config import CAP_PRONE_STRATA
from clipflow_ray.evaluate import metrics
from clipflow_ray.evaluate.baselines import BASELINES
from clipflow_ray.evaluate.record import (
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
from clipflow_ray.evaluate.views import CASES, VARIANTS
from clipflow_ray.images import stratum
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.statistics import auroc, excess_lower_bound, flagged_rate, wilson

ALPHAS: Final = (0.01, 0.05)
FLOW: Final = "flow"
METADATA_ONLY: Final = "metadata_only"
ORIGINAL: Final = "original"
_P_BINS: Final = 20

Columns = dict[str, NDArray[Any]]
Mask = NDArray[np.bool_]


def columns_of(table: pa.Table, **equal: Any) -> Columns:
    """Return the columns as arrays [N], of the rows in which each named column equals its value."""
    columns: Columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    kept = np.logical_and.reduce([columns[name] == value for name, value in equal.items()])
    return {name: values[kept] for name, values in columns.items()} if equal else columns


def figures(scores: pa.Table, calibrations: Sequence[Calibration]) -> DerivedFigures:
    """Return all figures except the robustness curves.

    `calibrations` are those of the checkpoint, then of the checkpoints of other seeds.
    """
    variants = {name: _variant(columns_of(scores, variant=name), calibrations) for name in VARIANTS}
    found, aligned = (variants[name] for name in VARIANTS)
    return DerivedFigures(
        auroc=found.detectors[FLOW].auroc,
        n=found.n,
        calibration_n=len(calibrations[0].scores),
        calibration_sources=calibrations[0].source_count,
        calibration_in_words=_in_words(calibrations[0]),
        variants=variants,
        metadata_only_auroc=found.metadata_only.auroc,
        format_gap_auroc={name: row.auroc - aligned.detectors[name].auroc for name, row in found.detectors.items()},
    )


def curves(robustness: pa.Table, calibration: Calibration) -> tuple[RobustnessPoint, ...]:
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
                tpr={f"{alpha:g}": rate(alpha, generated) for alpha in supported(calibration)},
                fpr={f"{alpha:g}": rate(alpha, ~generated) for alpha in supported(calibration)},
            )
        )
    return tuple(points)


def supported(calibration: Calibration) -> list[float]:
    """Return the alphas for which the calibration set is large enough.

    If it is large enough for none, return the largest, whose use raises an error that says what to do.
    """
    return [alpha for alpha in ALPHAS if calibration.supports(alpha)] or [max(ALPHAS)]


def _variant(rows: Columns, calibrations: Sequence[Calibration]) -> VariantFigures:
    """The figures of one variant: flow and baselines, per generator and per source, and the spread over seeds."""
    generated, calibration = rows["generated"], calibrations[0]
    columns: dict[str, str] = {FLOW: "score", **{name: name for name in BASELINES if name in rows}}
    table = {name: _headline(rows[column], rows) for name, column in columns.items()}
    p_values = rows["p_value"][~generated]
    alphas = supported(calibration)
    seeds = [_of_seed(rows[seed_column("score", at)], own, rows, alphas) for at, own in enumerate(calibrations)]
    return VariantFigures(
        n=_counts(generated),
        detectors=table,
        metadata_only=_headline(rows[METADATA_ONLY], rows),
        not_beaten=tuple(name for name, row in table.items() if name != FLOW and row.auroc >= table[FLOW].auroc),
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


def _headline(values: NDArray[Any], rows: Columns) -> DetectorFigures:
    generated = rows["generated"]
    negative, positive = values[~generated], values[generated]
    each = _per_generator(values, rows)
    return DetectorFigures(
        **dict(_ranking(values, rows, each)),
        auroc_95=metrics.bootstrap_auroc(negative, positive),
        average_precision=metrics.average_precision(negative, positive),
        oracle_tpr={f"{rate:g}": metrics.oracle_tpr(negative, positive, rate) for rate in ALPHAS},
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


def _in_words(calibration: Calibration) -> tuple[str, ...]:
    """The sentences of every alpha, each once."""
    alphas = supported(calibration)
    each = (calibration.in_words(a) + calibration.rule(a, CAP_PRONE_STRATA).in_words() for a in alphas)
    return tuple(dict.fromkeys(sentence for sentences in each for sentence in sentences))


def _strata(rows: Columns) -> NDArray[np.str_]:
    """The stratum of format and size of each image."""
    files = zip(rows["format"], rows["width"], rows["height"], strict=True)
    return np.array([stratum(str(kind), int(width), int(height)) for kind, width, height in files], np.str_)


def _groups(rows: Columns, mask: Mask) -> list[tuple[str, Mask]]:
    return [(str(name), mask & (rows["group"] == name)) for name in np.unique(rows["group"][mask])]


def _counts(generated: Mask) -> ClassCounts:
    return ClassCounts(natural=int((~generated).sum()), generated=int(generated.sum()))
