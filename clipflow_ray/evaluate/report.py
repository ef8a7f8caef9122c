"""The figures of an evaluation as a plain-text table for people."""

from typing import Any


def text(result: dict[str, Any]) -> str:
    """Headline, baselines, generators worst first, false positives per source; one block per variant."""
    lines = [
        f"checkpoint {result['model_id']}, calibrated on {result['calibration_n']} natural images",
        f"metadata-only probe (trained on the labels): AUROC {result['metadata_only_auroc']:.3f}",
    ]
    for name, figures in result["variants"].items():
        n = figures["n"]
        lines += ["", f"== {name.replace('_', ' ')}: {n['natural']} natural, {n['generated']} generated"]
        lines.append(f"{'':20}{'AUROC':>7}{'95 %':>16}{'AP':>7}{'macro':>7}{'worst q.':>9}")
        for detector, row in figures["detectors"].items():
            low, high = row["auroc_95"]
            lines.append(
                f"{detector:20}{row['auroc']:7.3f}{f'{low:.3f}-{high:.3f}':>16}{row['average_precision']:7.3f}"
                f"{row['macro_auroc']:7.3f}{row['worst_quartile_auroc']:9.3f}"
            )
        if len(figures["auroc_by_seed"]) > 1:
            lines.append("flow AUROC by seed: " + ", ".join(f"{v:.3f}" for v in figures["auroc_by_seed"]))
        for alpha, at in figures["thresholds"].items():
            lines.append(
                f"at alpha {alpha}: recall {at['tpr']['rate']:.3f}, false positives {at['fpr']['rate']:.3f}"
                f" (expected {_span(at['false_positive_rate_95'])}), balanced accuracy {at['balanced_accuracy']:.3f}"
            )
            for source, row in at["per_source"].items():
                inside = "inside" if row["inside"] else "OUTSIDE"
                lines.append(
                    f"    {source:28}{row['flagged']:4}/{row['of']:<4} false positives {row['rate']:.3f}, "
                    f"{inside} {_span(row['expected_95'])}"
                )
        recall = figures["thresholds"]["0.05"]["per_generator"]
        lines.append(f"{'generator, worst first':32}{'n':>5}{'AUROC':>7}{'recall at 5 %':>15}")
        for generator, value in figures["detectors"]["flow"]["per_generator_auroc"].items():
            row = recall[generator]
            lines.append(f"    {generator:28}{row['of']:5}{value:7.3f}{row['rate']:9.2f} {_span(row['wilson_95'])}")
    return "\n".join(lines)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"
