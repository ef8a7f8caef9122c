"""The figures of an evaluation as plain text."""

from collections.abc import Sequence
from typing import Final

from clipflow_ray.evaluate.figures import FLOW
from clipflow_ray.evaluate.record import MIN_CELL, CellFigures, EvaluationFigures, RobustnessPoint
from clipflow_ray.evaluate.views import AS_FOUND

# By whether a source lies in the range of a source never seen; None if that is unknown.
_UNSEEN: Final = {None: "", True: ", inside for a source never seen", False: ", OUTSIDE for a source never seen"}


def text(result: EvaluationFigures) -> str:
    """Return tables for each variant (detectors, rates, sources, generators worst first), then further tables.

    These are the figures by file format and by size, and the robustness. The tables that have one alpha have the
    largest.
    """
    lines = [
        f"checkpoint {result.model_id}, calibrated on {result.calibration_n} natural images",
        *result.calibration_in_words,
        f"AUROC as found minus format-aligned: {result.format_gap_auroc[FLOW]:+.3f}",
    ]
    alpha = max(result.variants[AS_FOUND].thresholds, key=float)
    for name, figures in result.variants.items():
        n = figures.n
        lines += ["", f"== {name.replace('_', ' ')}: {n.natural} natural, {n.generated} generated"]
        lines.append(f"{'':20}{'AUROC':>7}{'95 %':>16}{'AP':>7}{'macro':>7}{'worst q.':>9}")
        for detector, row in figures.detectors.items():
            low, high = row.auroc_95
            lines.append(
                f"{detector:20}{row.auroc:7.3f}{f'{low:.3f}-{high:.3f}':>16}{row.average_precision:7.3f}"
                f"{row.macro_auroc:7.3f}{row.worst_quartile_auroc:9.3f}"
            )
        lines.append(f"{'metadata only':20}{figures.metadata_only.auroc:7.3f}  (trained on the labels)")
        for baseline, against in figures.comparisons.items():
            low, high = against.difference_95
            lines.append(
                f"flow against {baseline}: {against.outcome}, "
                f"difference {against.auroc_difference:+.3f} ({low:+.3f} to {high:+.3f})"
            )
        if spread := figures.over_seeds.get("auroc"):
            values = ", ".join(f"{v:.3f}" for v in figures.auroc_by_seed)
            lines.append(f"flow AUROC by seed: {values}; mean {spread.mean:.3f}, deviation {spread.std:.3f}")
        for level, at in figures.thresholds.items():
            lines.append(
                f"at alpha {level}: recall {at.tpr.rate:.3f}, false positives {at.fpr.rate:.3f}"
                f" (expected {_span(at.false_positive_rate_95)}), balanced accuracy {at.balanced_accuracy:.3f}"
            )
            if at.prone_strata:
                lines.append(
                    f"    of these {at.capped.natural} natural and {at.capped.generated} generated are at most "
                    f"inconclusive for their format and size: {', '.join(at.prone_strata)}"
                )
            together = at.audited_together
            lines.append(
                f"    audited together {together.share:.3f} are flagged, excess flag rate at least "
                f"{together.excess_lower_bound:.3f}, {together.generated_share:.3f} are generated"
            )
            for source, false in at.per_source.items():
                inside = "inside" if false.inside else "OUTSIDE"
                lines.append(
                    f"    {source:28}{false.flagged:4}/{false.of:<4} false positives {false.rate:.3f}, "
                    f"{inside} {_span(false.expected_95)}{_UNSEEN[false.inside_unseen]}"
                )
        recall = figures.thresholds[alpha].per_generator
        lines.append(f"{'generator, worst first':32}{'n':>5}{'AUROC':>7}{f'recall at {alpha}':>16}")
        for generator, value in figures.detectors[FLOW].per_generator_auroc.items():
            rate = recall[generator]
            lines.append(f"    {generator:28}{rate.of:5}{value:7.3f}{rate.rate:9.2f} {_span(rate.wilson_95)}")
    lines += _cells("by file format, as found", result.by_format) + _cells("by short side, as found", result.by_size)
    return "\n".join(lines + _robustness(result.robustness, alpha))


def _cells(title: str, cells: dict[str, CellFigures]) -> list[str]:
    lines = ["", f"== {title}"]
    for name, cell in cells.items():
        auroc = f"no AUROC with fewer than {MIN_CELL} images of a class"
        if cell.auroc is not None and cell.auroc_95 is not None:
            auroc = f"AUROC {cell.auroc:.3f} ({_span(cell.auroc_95)})"
        lines.append(f"{name}: {cell.n.natural} natural, {cell.n.generated} generated; {auroc}")
        for word, rates in (("recall", cell.tpr), ("false positives", cell.fpr)):
            lines += [
                f"    {f'{word} at alpha {alpha}':28}{rate.flagged:4}/{rate.of:<4} {rate.rate:.3f} "
                f"({_span(rate.wilson_95)})"
                for alpha, rate in rates.items()
            ]
    return lines


def _robustness(points: Sequence[RobustnessPoint], alpha: str) -> list[str]:
    if not points:
        return []
    n = points[0].n
    lines = ["", f"== robustness: {n.natural} natural, {n.generated} generated"]
    lines.append(f"{'distortion':20}{'AUROC':>7}{f'false positives at {alpha}':>25}")
    for point in points:
        name = f"{point.distortion} {point.level:g}" if point.level else point.distortion
        rate = point.fpr[alpha]
        lines.append(f"{name:20}{point.auroc:7.3f}{rate.rate:11.3f} {_span(rate.wilson_95)}")
    return lines


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"
