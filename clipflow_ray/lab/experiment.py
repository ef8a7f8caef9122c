"""Compare candidate settings: each is fitted with every proxy family held out in turn.

The figure of a fit is the AUROC of proxies of the held-out family against photographs of validation sources. No
AI-generated image is used. Embeddings are encoded once for all candidates. Each fit is a Ray task of one core, and its
result is a file of its own, so an experiment that was interrupted or has new candidates repeats no finished fit.
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
from clipflow_ray.model.encoder import resolved, widths_of
from clipflow_ray.model.weights import load_record
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
_FIGURES_VERSION: Final = 2  # raise it if the definition of a figure changes: fits with older figures are repeated
# Figures that may predict the test AUROC, and their names on the page.
_SIGNALS: Final = {
    "auroc": "AUROC on held-out families",
    "tpr_5": "recall of held-out families at the calibrated 5 %",
    "auroc_sources": "AUROC between natural sources",
}


@dataclass(frozen=True)
class Fit:
    """One fit: a candidate, the held-out family and a seed. `key` names the file of its result.

    Proxies of the families in `without` do not train.
    """

    key: str
    candidate: str
    held_out: str
    seed: int
    config: TrainConfig
    without: tuple[str, ...]


def experiment(config: ExperimentConfig) -> ExperimentResult:
    """Make the missing embeddings and fits, then write `results.parquet` and `experiment.html`.

    Both are written to `train.output`/experiment. The row of a failed fit has its `error`. Raises ConfigError for an
    unknown family or feature, and the errors of a training.
    """
    base = settled(config.train, "input", "output")
    tower = load_record(base.encoder)
    base = base.model_copy(
        update={
            "segments": resolved(base.segments, base.encoder, tower),
            "extra_segments": resolved(base.extra_segments, base.encoder, tower) if base.extra_segments else (),
        }
    )
    resources.connect()
    run = features.extract(base)
    root = Place.at(base.output, base.s3) / "experiment"
    fits = _fits(config, base, run)
    done = _finished(root / "fits", fits)
    log.info("%d fits, of which %d are finished already", len(fits), len(done))
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
    """Return one line for each candidate, best first: means over held-out families and seeds, spread over seeds.

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
    """The mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def rank_correlation(
    summary: Sequence[CandidateLine], test_auroc: dict[str, float], figure: str = "auroc"
) -> tuple[float, int] | None:
    """Return Spearman's rho between a figure and `test_auroc`, and the number of candidates that have both.

    Returns None for fewer than three such candidates, or if all of them have the same figure.
    """
    pairs = [
        (getattr(line, figure), test_auroc[line.candidate])
        for line in summary
        if line.candidate in test_auroc and getattr(line, figure) is not None
    ]
    if len(pairs) < 3 or len({value for value, _ in pairs}) == 1:
        return None
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def _fits(config: ExperimentConfig, base: TrainConfig, run: Run) -> list[Fit]:
    families = sorted(base.proxies.families)
    unknown = sorted({*config.held_out, *(name for each in config.candidates for name in each.without)} - set(families))
    stored = {*base.segments, *base.extra_segments}
    tower = load_record(base.encoder)
    chosen = {
        each.name: resolved(each.segments, base.encoder, tower) if each.segments else base.segments
        for each in config.candidates
    }
    wanted = {segment for segments in chosen.values() for segment in segments}
    missing = sorted(segment.name for segment in wanted - stored)
    if unknown or missing:
        raise ConfigError(
            f"Unknown proxy families: {unknown}. Segments that the training does not store: {missing}. "
            f"The families are {', '.join(families)}. Name segments in `train.extra_segments`."
        )
    return [
        _fit(candidate, base.model_copy(update={"segments": chosen[candidate.name]}), run, family, seed)
        for candidate in config.candidates
        for family in config.held_out or families
        for seed in config.seeds
    ]


def _fit(candidate: Candidate, base: TrainConfig, run: Run, family: str, seed: int) -> Fit:
    fit = (candidate.fit or base.fit).model_copy(update={"seed": seed})
    changed = base.model_copy(
        update={
            "flow": candidate.flow or base.flow,
            "objective": candidate.objective or base.objective,
            "fit": fit,
            "split": base.split.model_copy(update={"held_out_family": family}),
        }
    )
    shape = changed.model_dump(mode="json", include={"encoder", "segments", "flow", "objective", "fit", "split"})
    made = {"features": run.place.name, "without": sorted(candidate.without), "figures": _FIGURES_VERSION}
    key = stable_hash(shape | made)
    return Fit(key, candidate.name, family, seed, changed, candidate.without)


def _finished(folder: Place, fits: list[Fit]) -> list[FitRow]:
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
        segments: ray.put(features.load(run, segments, fits[0].config.proxies))
        for segments in {each.config.segments for each in fits}
    }
    tower = load_record(fits[0].config.encoder)
    widths = {segments: widths_of(segments, fits[0].config.encoder, tower) for segments in loaded}
    waiting = {
        _held_out_figures.remote(
            each.config, loaded[each.config.segments], widths[each.config.segments], each.without
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
    config: TrainConfig, loaded: Features, widths: tuple[int, ...], without: tuple[str, ...]
) -> HeldOutFigures:
    torch.set_num_threads(1)
    try:
        loop = Loop(config, _without_families(split(loaded, config.split), without), widths)
        figures = [loop.epoch(number) for number in range(config.fit.epochs)][-1]
    except (ConfigError, TrainingError) as error:  # ConfigError comes from the split, if no image drew the family
        return HeldOutFigures(error=str(error))
    return HeldOutFigures(**{name: figures.get(source) for name, source in _FIGURES.items()})


def _without_families(data: Split, without: tuple[str, ...]) -> Split:
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
    for figure, name in _SIGNALS.items() if config.test_auroc else ():
        correlations[name] = rank_correlation(summary, config.test_auroc, figure)
        shown = [line for line in good if line.candidate in config.test_auroc and getattr(line, figure) is not None]
        if shown:
            chart = _against_test_auroc(shown, config.test_auroc, figure)
            charts.append({"svg": chart, "label": f"{name} against the test AUROC, as in the text."})
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
        axes.set_xlabel("held-out AUROC: one dot for each seed, a bar for the mean")

    return pages.chart(draw, (6.4, 1.2 + 0.3 * len(good)))


def _families(good: Sequence[CandidateLine]) -> str:
    families = list(good[0].families)
    values = np.array([[line.families.get(family, np.nan) for family in families] for line in good])

    def draw(axes: Any) -> None:
        axes.imshow(values, vmin=0.5, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(good)), [line.candidate for line in good])
        axes.set_xticks(range(len(families)), families, rotation=90)

    return pages.chart(draw, (6.4, 2.2 + 0.3 * len(good)))


def _against_test_auroc(shown: Sequence[CandidateLine], test_auroc: dict[str, float], figure: str) -> str:
    def draw(axes: Any) -> None:
        for line in shown:
            at = (getattr(line, figure), test_auroc[line.candidate])
            axes.plot(*[[value] for value in at], "o", color=pages.SUSPICIOUS_COLOUR)
            axes.annotate(line.candidate, at, color=pages.GREY)
        axes.set_xlabel(_SIGNALS[figure])
        axes.set_ylabel("test AUROC on AI-generated images")

    return pages.chart(draw)
