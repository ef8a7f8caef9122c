"""The evaluation protocol: natural and generated images -> figures, with baselines on the same embeddings.

Nothing here feeds back into a checkpoint: thresholds come from its own calibration, and no choice is made.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipflow_ray.config import EvaluateConfig
from clipflow_ray.data import resources
from clipflow_ray.data.inventory import listing_hash
from clipflow_ray.data.listing import write_manifest
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.resumable import MANIFEST, Run
from clipflow_ray.data.scoring import Embed
from clipflow_ray.errors import ConfigError, InputError
from clipflow_ray.evaluate import metrics
from clipflow_ray.evaluate.baselines import fit_baselines
from clipflow_ray.evaluate.views import VARIANTS, read_both
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector, Scores
from clipflow_ray.storage import filesystem, join, normalized, resolved

log = logging.getLogger(__name__)

ALPHAS: Final = (0.01, 0.05)
_EMBEDDINGS: Final = "embeddings"
_ENCODE_ROWS: Final = 16


@dataclass(frozen=True)
class Scored:
    """What each seed's flow says of the N images of one variant, and suspicion [N] by baseline."""

    flows: list[Scores]
    baselines: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Labelled:
    """N images: embeddings float32 [N, D] for one variant, what each is, and where it comes from."""

    embedding: NDArray[np.float32]
    generated: NDArray[np.bool_]
    group: NDArray[np.str_]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Figures of `config.checkpoint` on labelled images, as a json-ready dict with `auroc` at the top.

    Writes per-image scores and the figures under `config.output`; embeddings there are reused when nothing changed.
    Each of `config.seeds` is a checkpoint that differs in its seed alone, for the spread. Raises ClipflowError.
    """
    s3 = resolved(config.s3)
    natural, generated = (tuple(map(normalized, uris)) for uris in (config.natural, config.generated))
    if not natural or not generated:
        raise ConfigError("Name at least one --natural and one --generated input.")
    detectors = [Detector(load_checkpoint(uri, s3)) for uri in (config.checkpoint, *config.seeds)]
    first = detectors[0]
    if len({(d.encoder.fingerprint, d.encoder.features) for d in detectors}) > 1:
        raise ConfigError("The checkpoints differ in encoder or feature; evaluate them one at a time.")
    resources.connect()
    run = _embedded(config.model_copy(update={"s3": s3}), natural + generated, first)
    table, variants = _labelled(run, first.encoder.features, generated)
    ok = table.filter(pc.equal(table["status"], "ok"))
    baselines = fit_baselines(first.checkpoint)
    scored = {
        name: Scored(
            [detector.score_embeddings(data.embedding) for detector in detectors],
            {baseline: scorer(data.embedding) for baseline, scorer in baselines.items()},
        )
        for name, data in variants.items()
    }
    result: dict[str, Any] = {
        "model_id": first.checkpoint.model_id,
        "calibration_id": first.calibration.calibration_id,
        "calibration_n": len(first.calibration.scores),
        "unreadable": len(table) - len(ok),
        "variants": {name: _figures(first, scored[name], data) for name, data in variants.items()},
        "metadata_only_auroc": _metadata_only(ok, variants[VARIANTS[0]].generated),
    }
    found = result["variants"][VARIANTS[0]]
    result |= {"auroc": found["detectors"]["flow"]["auroc"], "n": found["n"]}
    _write(run, config.output, ok, variants, scored, result)
    return result


def _embedded(config: EvaluateConfig, inputs: Sequence[str], detector: Detector) -> Run:
    """Both variants of every image through the encoder, once."""
    run = Run(join(normalized(config.output), "evaluation"), config.s3)
    identity = {
        "input": list(inputs),
        "listing": listing_hash(inputs, config.s3),
        "encoder_fingerprint": detector.encoder.fingerprint,
        "features": list(detector.encoder.features),
    }
    record = run.begin(identity, lambda: write_manifest(inputs, run.path(MANIFEST), config.s3))
    if run.finished:
        return run
    plan, encoder = resources.plan_scoring(), detector.encoder

    run.write(
        _EMBEDDINGS,
        lambda manifest: read_then_encode(
            manifest,
            plan,
            _ENCODE_ROWS,
            read_both,
            {"s3": config.s3, "limits": detector.checkpoint.limits, "kind": encoder.config.view},
            Embed,
            {"encoder": encoder.config, "features": encoder.features, "fingerprint": encoder.fingerprint},
        ),
        record["manifest_rows"],
    )
    run.succeed(record)
    return run


def _labelled(run: Run, features: Sequence[str], generated: Sequence[str]) -> tuple[pa.Table, dict[str, Labelled]]:
    table = run.table(_EMBEDDINGS).to_table().sort_by("row_id")
    ok = table.filter(pc.equal(table["status"], "ok"))
    if len(ok) == 0:
        raise InputError("No image could be read; look at the error codes of the embeddings.")
    prefixes = tuple(join(uri, "") for uri in generated)
    labels = np.array([uri.startswith(prefixes) or uri in generated for uri in ok["uri"].to_pylist()])
    if labels.all() or not labels.any():
        raise InputError("One of the two classes has no readable image.")
    parts = [ok[n].combine_chunks().flatten().to_numpy().reshape(len(ok), len(VARIANTS), -1) for n in features]
    both = np.concatenate(parts, axis=2)
    group = np.array(ok["group"].to_pylist())
    return table, {name: Labelled(np.ascontiguousarray(both[:, at]), labels, group) for at, name in enumerate(VARIANTS)}


def _figures(detector: Detector, scored: Scored, data: Labelled) -> dict[str, Any]:
    """One variant: flow and baselines, per generator and per source, and the spread over seeds."""
    scores = scored.flows
    table = {"flow": scores[0].score, **scored.baselines}
    return {
        "n": {"natural": int((~data.generated).sum()), "generated": int(data.generated.sum())},
        "detectors": {name: _headline(values, data) for name, values in table.items()},
        "auroc_by_seed": [metrics.auroc(s.score[~data.generated], s.score[data.generated]) for s in scores],
        "thresholds": {f"{alpha:g}": _at_threshold(detector, scores[0], data, alpha) for alpha in _supported(detector)},
        "p_uniformity_on_naturals": metrics.uniformity(scores[0].p_value[~data.generated]),
    }


def _supported(detector: Detector) -> list[float]:
    """The alphas that the calibration set is large enough for; the largest is kept, to be refused in words."""
    return [alpha for alpha in ALPHAS if detector.calibration.supports(alpha)] or [max(ALPHAS)]


def _headline(values: NDArray[Any], data: Labelled) -> dict[str, Any]:
    negative, positive = values[~data.generated], values[data.generated]
    per_generator = {
        str(name): metrics.auroc(negative, values[data.generated & (data.group == name)])
        for name in np.unique(data.group[data.generated])
    }
    ordered = sorted(per_generator.values())
    return {
        "auroc": metrics.auroc(negative, positive),
        "auroc_95": metrics.bootstrap_auroc(negative, positive),
        "average_precision": metrics.average_precision(negative, positive),
        "oracle_tpr": {f"{rate:g}": metrics.oracle_tpr(negative, positive, rate) for rate in ALPHAS},
        "macro_auroc": float(np.mean(ordered)),
        "worst_quartile_auroc": float(np.mean(ordered[: max(1, len(ordered) // 4)])),
        "per_generator_auroc": dict(sorted(per_generator.items(), key=lambda item: item[1])),
    }


def _at_threshold(detector: Detector, scores: Any, data: Labelled, alpha: float) -> dict[str, Any]:
    """What the calibrated threshold realises: recall per generator, false positives per natural source."""
    flagged = scores.score > detector.calibration.threshold(alpha)

    def share(mask: NDArray[np.bool_]) -> dict[str, Any]:
        count, of = int(flagged[mask].sum()), int(mask.sum())
        return {"flagged": count, "of": of, "rate": count / of, "wilson_95": metrics.wilson(count, of)}

    sources: dict[str, Any] = {}
    for name in np.unique(data.group[~data.generated]):
        row = share(~data.generated & (data.group == name))
        low, high = detector.calibration.flagged_interval(alpha, row["of"])
        sources[str(name)] = row | {"expected_95": (low, high), "inside": low <= row["rate"] <= high}
    true, false = share(data.generated), share(~data.generated)
    return {
        "tpr": true,
        "fpr": false,
        "balanced_accuracy": 0.5 * (true["rate"] + 1.0 - false["rate"]),
        "false_positive_rate_95": detector.calibration.false_positive_interval(alpha),
        "per_generator": {
            str(name): share(data.generated & (data.group == name)) for name in np.unique(data.group[data.generated])
        },
        "per_source": sources,
    }


def _metadata_only(ok: pa.Table, generated: NDArray[np.bool_]) -> float:
    width, height, size = (ok[name].to_numpy().astype(float) for name in ("width", "height", "bytes"))
    numbers = np.c_[np.log(width * height), np.abs(np.log(width / height)), np.log(size / (width * height))]
    return metrics.metadata_auroc(np.array(ok["format"].to_pylist()), numbers, generated)


def _write(
    run: Run,
    output: str,
    ok: pa.Table,
    variants: dict[str, Labelled],
    scored: dict[str, Scored],
    result: dict[str, Any],
) -> None:
    """`scores.parquet` (one row an image and variant) and `figures.json`, so that every number can be derived again."""
    rows = []
    for name, data in variants.items():
        scores = scored[name].flows[0]
        columns = {
            "row_id": ok["row_id"],
            "uri": ok["uri"],
            "variant": [name] * len(ok),
            "group": data.group,
            "generated": data.generated,
            "score": scores.score,
            "p_value": scores.p_value,
        }
        columns |= {baseline: values.astype(np.float32) for baseline, values in scored[name].baselines.items()}
        rows.append(pa.table(columns))
    fs, path = filesystem(normalized(output), run.s3)
    pq.write_table(pa.concat_tables(rows), join(path, "scores.parquet"), filesystem=fs)
    with fs.open_output_stream(join(path, "figures.json")) as stream:
        stream.write((json.dumps(result, indent=1) + "\n").encode())
