"""Many ideas on embeddings that are encoded once: each is fitted with every proxy family held out in turn.

The figure is how well a candidate ranks proxies of a family that it never saw above photographs of sources that it
never saw. No AI-generated image takes part. Fits are Ray tasks of one core each; a finished one is kept in a file of
its own, so an experiment that was cut off, or grew, goes on where it stood.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import torch
from scipy import stats

from clipflow_ray import proxies
from clipflow_ray.config import Candidate, ExperimentConfig, TrainConfig, stable_hash
from clipflow_ray.data import resources
from clipflow_ray.errors import ConfigError, TrainingError
from clipflow_ray.lab.record import CandidateLine, ExperimentResult, FitRow, HeldOutFigures
from clipflow_ray.place import Place, settled
from clipflow_ray.reports import pages
from clipflow_ray.runs.folder import Run
from clipflow_ray.train import features
from clipflow_ray.train.features import Features
from clipflow_ray.train.loop import SELECTION, Loop
from clipflow_ray.train.split import Split, split

log = logging.getLogger(__name__)

_FIGURES: Final = {
    "auroc": SELECTION,
    "tpr_5": "tpr_5",
    "auroc_sources": "auroc_sources",
    "nll_median": "nll_natural_median",
    "auroc_seen": "auroc_seen",
}
_DEFINITION: Final = 2  # of the figures: a finished fit with an older one is done again
# What may predict looks, and how the page calls it.
_SIGNALS: Final = {
    "auroc": "AUROC on held-out families",
    "tpr_5": "recall of held-out families at the calibrated 5 %",
    "auroc_sources": "AUROC between natural sources",
}


@dataclass(frozen=True)
class Fit:
    """One fit to do: a candidate, the family it does not see, a seed; `key` names its result."""

    key: str
    candidate: str
    held_out: str
    seed: int
    config: TrainConfig
    without: tuple[str, ...]


def experiment(config: ExperimentConfig) -> ExperimentResult:
    """Encode what is not encoded yet, do the fits that are not done yet, write `results.parquet` and `experiment.html`.

    Both lie under `train.output`/experiment. A candidate whose loss was not finite has a row that says so. Raises
    ConfigError for an unknown family or feature, else what training raises.
    """
    base = settled(config.train, "input", "output")
    resources.connect()
    run = features.extract(base)
    root = Place.at(base.output, base.s3) / "experiment"
    fits = _fits(config, base, run)
    done = _done(root / "fits", fits)
    log.info("%d fits, %d of them done before", len(fits), len(done))
    rows = [
        *done,
        *_fitted([each for each in fits if each.key not in {row.key for row in done}], run, root / "fits"),
    ]
    order = {each.key: number for number, each in enumerate(fits)}
    rows.sort(key=lambda row: order[row.key])
    results, page = root / "results.parquet", root / "experiment.html"
    results.write_parquet(pa.Table.from_pylist([row.model_dump() for row in rows]))
    summary = summarized(rows)
    page.write(_page(config, rows, summary))
    return ExperimentResult(results=results.uri, page=page.uri, summary=tuple(summary))


def summarized(rows: Sequence[FitRow]) -> list[CandidateLine]:
    """One line for each candidate, best first: means over held-out families and seeds, and the spread of seeds.

    `auroc` is the macro mean over families; `auroc_sd` the standard deviation of that mean over seeds; `worst` the
    family with the lowest mean over seeds. A candidate with a failed fit has `failed` and comes last.
    """
    lines = [
        _summarized(name, [row for row in rows if row.candidate == name])
        for name in dict.fromkeys(row.candidate for row in rows)
    ]
    return sorted(lines, key=lambda line: -1.0 if line.auroc is None else line.auroc, reverse=True)


def _summarized(name: str, own: Sequence[FitRow]) -> CandidateLine:
    failed = next((row.error for row in own if row.error), None)
    if failed:
        return CandidateLine(candidate=name, fits=len(own), failed=failed)
    aurocs = {(row.held_out, row.seed): row.auroc for row in own if row.auroc is not None}
    by_seed = [
        np.mean([value for key, value in aurocs.items() if key[1] == seed])
        for seed in dict.fromkeys(s for _, s in aurocs)
    ]
    by_family = {
        family: float(np.mean([value for key, value in aurocs.items() if key[0] == family]))
        for family in dict.fromkeys(name for name, _ in aurocs)
    }
    worst = min(by_family, key=lambda family: by_family[family])
    return CandidateLine(
        candidate=name,
        fits=len(own),
        failed=None,
        **{figure: _mean([getattr(row, figure) for row in own]) for figure in _FIGURES},
        auroc_sd=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
        worst=worst,
        worst_auroc=by_family[worst],
        families=by_family,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def rank_correlation(
    summary: Sequence[CandidateLine], looks: dict[str, float], figure: str = "auroc"
) -> tuple[float, int] | None:
    """Spearman's rho between a figure and the AUROC of looks, and how many candidates have both.

    None below three of them, or where all have the same figure.
    """
    pairs = [
        (getattr(line, figure), looks[line.candidate])
        for line in summary
        if line.candidate in looks and getattr(line, figure) is not None
    ]
    if len(pairs) < 3 or len({value for value, _ in pairs}) == 1:
        return None
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def _fits(config: ExperimentConfig, base: TrainConfig, run: Run) -> list[Fit]:
    families = sorted(base.proxies.families)
    unknown = sorted({*config.held_out, *(name for each in config.candidates for name in each.without)} - set(families))
    stored = {*base.encoder.feature, *base.extra_features}
    missing = sorted({name for each in config.candidates for name in each.feature} - stored)
    if unknown or missing:
        raise ConfigError(
            f"Unknown proxy families {unknown} or features that the training does not cache {missing}; "
            f"there are {', '.join(families)}; name features in `train.extra_features`."
        )
    return [
        _fit(candidate, base, run, family, seed)
        for candidate in config.candidates
        for family in config.held_out or families
        for seed in config.seeds
    ]


def _fit(candidate: Candidate, base: TrainConfig, run: Run, family: str, seed: int) -> Fit:
    fit = (candidate.fit or base.fit).model_copy(update={"seed": seed})
    changed = base.model_copy(
        update={
            "encoder": base.encoder.model_copy(update={"feature": candidate.feature or base.encoder.feature}),
            "flow": candidate.flow or base.flow,
            "objective": candidate.objective or base.objective,
            "fit": fit,
            "split": base.split.model_copy(update={"held_out_family": family}),
        }
    )
    shape = changed.model_dump(mode="json", include={"encoder", "flow", "objective", "fit", "split"})
    made = {"features": run.place.name, "without": sorted(candidate.without), "figures": _DEFINITION}
    key = stable_hash(shape | made)
    return Fit(key, candidate.name, family, seed, changed, candidate.without)


def _done(folder: Place, fits: list[Fit]) -> list[FitRow]:
    there = set(folder.names())
    return [
        FitRow.model_validate_json((folder / f"{each.key}.json").read_text()).model_copy(
            update={"candidate": each.candidate}
        )
        for each in fits
        if f"{each.key}.json" in there
    ]


def _fitted(fits: list[Fit], run: Run, folder: Place) -> list[FitRow]:
    loaded = {
        feature: ray.put(features.load(run, feature, fits[0].config.proxies))
        for feature in {each.config.encoder.feature for each in fits}
    }
    widths = {feature: features.widths(run, feature) for feature in loaded}
    waiting = {
        _held_out_figures.remote(
            each.config, loaded[each.config.encoder.feature], widths[each.config.encoder.feature], each.without
        ): each
        for each in fits
    }
    rows = []
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
        each = waiting.pop(ready)
        found: HeldOutFigures = ray.get(ready)
        row = FitRow(key=each.key, candidate=each.candidate, held_out=each.held_out, seed=each.seed, **dict(found))
        (folder / f"{each.key}.json").write(row.model_dump_json())
        rows.append(row)
        log.info("%s without %s, seed %d: %s", each.candidate, each.held_out, each.seed, row.error or row.auroc)
    return rows


@ray.remote(num_cpus=1)
def _held_out_figures(
    config: TrainConfig, loaded: Features, segments: tuple[int, ...], without: tuple[str, ...]
) -> HeldOutFigures:
    torch.set_num_threads(1)
    try:
        loop = Loop(config, _less(split(loaded, config.split), without), segments)
        figures = [loop.epoch(number) for number in range(config.fit.epochs)][-1]
    except (ConfigError, TrainingError) as error:  # of the split: no image drew the family
        return HeldOutFigures(error=str(error))
    return HeldOutFigures(**{name: figures.get(source) for name, source in _FIGURES.items()})


def _less(data: Split, without: tuple[str, ...]) -> Split:
    return Split(**(vars(data) | {"proxy": data.proxy.where(~proxies.involves(data.proxy.family, without))}))


def _page(config: ExperimentConfig, rows: Sequence[FitRow], summary: Sequence[CandidateLine]) -> str:
    good = [line for line in summary if not line.failed]
    charts = []
    if good:
        best = ", ".join(f"{line.candidate} {line.auroc:.3f}" for line in good[:5])
        charts.append(
            {"svg": _ranking(good, rows), "label": f"Held-out AUROC of each candidate and seed. Best: {best}."}
        )
        charts.append(
            {"svg": _families(good), "label": "Held-out AUROC of each candidate and family, as in the table."}
        )
    correlations = {}
    for figure, name in _SIGNALS.items() if config.looks else ():
        correlations[name] = rank_correlation(summary, config.looks, figure)
        if shown := [line for line in good if line.candidate in config.looks and getattr(line, figure) is not None]:
            charts.append(
                {"svg": _looks(shown, config.looks, figure), "label": f"{name} against looks, as in the text."}
            )
    return (
        pages.environment("clipflow_ray.lab")
        .get_template("experiment.html.j2")
        .render(config=config, summary=summary, charts=charts, correlations=correlations)
    )


def _ranking(good: Sequence[CandidateLine], rows: Sequence[FitRow]) -> str:
    def draw(axes: Any) -> None:
        for at, line in enumerate(reversed(good)):
            own = [row for row in rows if row.candidate == line.candidate]
            means = [_mean([row.auroc for row in own if row.seed == seed]) for seed in {row.seed for row in own}]
            axes.plot(means, [at] * len(means), "o", color=pages.NATURAL_COLOUR)
            axes.plot([line.auroc], [at], "|", color=pages.SUSPICIOUS_COLOUR, markersize=14)
        axes.set_yticks(range(len(good)), [line.candidate for line in reversed(good)])
        axes.set_xlabel("AUROC on families held out in turn: seeds, and their mean")

    return pages.chart(draw, (6.4, 1.2 + 0.3 * len(good)))


def _families(good: Sequence[CandidateLine]) -> str:
    families = list(good[0].families)
    values = np.array([[line.families.get(family, np.nan) for family in families] for line in good])

    def draw(axes: Any) -> None:
        axes.imshow(values, vmin=0.5, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(good)), [line.candidate for line in good])
        axes.set_xticks(range(len(families)), families, rotation=90)

    return pages.chart(draw, (6.4, 2.2 + 0.3 * len(good)))


def _looks(shown: Sequence[CandidateLine], looks: dict[str, float], figure: str) -> str:
    def draw(axes: Any) -> None:
        for line in shown:
            at = (getattr(line, figure), looks[line.candidate])
            axes.plot(*[[value] for value in at], "o", color=pages.SUSPICIOUS_COLOUR)
            axes.annotate(line.candidate, at, color=pages.GREY)
        axes.set_xlabel(_SIGNALS[figure])
        axes.set_ylabel("AUROC on AI-generated images")

    return pages.chart(draw)
