"""The evaluation protocol: figures of a checkpoint and of baselines on the same natural and generated images.

An evaluation changes no checkpoint and selects nothing. Thresholds come from the checkpoint's own calibration.

scores.parquet       one row for each image and variant; every figure except the curves is computed from it
robustness.parquet   one row for each image and distortion, if robustness was asked for
calibration.parquet  the calibration scores of each checkpoint, with stratum, source and the source's weight
figures.json         the figures; report.html shows them
evaluation/, robustness-N/   embeddings, reused if nothing changed
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipflow_ray.config import DISCLAIMER, EvaluateConfig
from clipflow_ray.data import resources
from clipflow_ray.errors import ConfigError, InputError
from clipflow_ray.evaluate import metrics
from clipflow_ray.evaluate.baselines import fit_baselines
from clipflow_ray.evaluate.embeddings import EMBEDDINGS, both_variants, distortions, embeddings_of, readable
from clipflow_ray.evaluate.figures import METADATA_ONLY, ORIGINAL, curves, figures, seed_column
from clipflow_ray.evaluate.record import EvaluationFigures
from clipflow_ray.evaluate.report import write_page
from clipflow_ray.evaluate.views import ALIGNED_BYTES, ALIGNED_SIDE, CASES, VARIANTS
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.place import Place, places, settled
from clipflow_ray.runs.folder import Run

_FILE_COLUMNS: Final = ("row_id", "uri", "member", "group", "width", "height", "format", "bytes")


def evaluate(config: EvaluateConfig) -> EvaluationFigures:
    """Evaluate `config.checkpoint` on labelled images and return the figures.

    Writes per-image scores, the figures and a page under `config.output`. Embeddings there are reused if nothing
    changed. `config.seeds` names checkpoints that differ in their seed alone; they give the spread over seeds. Raises
    ClipflowError.
    """
    config = settled(config, "natural", "generated", "output")
    if not config.natural or not config.generated:
        raise ConfigError("Name at least one --natural and one --generated input.")
    checkpoints = [load_checkpoint(at) for at in places((config.checkpoint, *config.seeds), config.s3)]
    if len({(checkpoint.encoder_fingerprint, checkpoint.segments) for checkpoint in checkpoints}) > 1:
        raise ConfigError("The checkpoints differ in encoder or segments; evaluate them one at a time.")
    first = Detector(checkpoints[0])
    detectors = [first, *(Detector(checkpoint, encoder=first.encoder) for checkpoint in checkpoints[1:])]
    resources.connect()
    run = both_variants(config, places(config.natural + config.generated, config.s3), first)
    rows = readable(run)
    labels = _labels(rows, config.generated)
    tables = {"scores": _scores(rows, labels, detectors), "calibration": _calibration(detectors)}
    if config.robustness:
        tables["robustness"] = _robustness(config, run, tables["scores"], first)
    unreadable = _unreadable(run)
    result = EvaluationFigures(
        disclaimer=DISCLAIMER,
        model_id=first.checkpoint.model_id,
        calibration_id=first.calibration.calibration_id,
        seed_model_ids=tuple(detector.checkpoint.model_id for detector in detectors[1:]),
        natural=config.natural,
        generated=config.generated,
        **dict(figures(tables["scores"], [detector.calibration for detector in detectors])),
        unreadable=unreadable.total(),
        unreadable_by_code=dict(sorted(unreadable.items())),
        robustness=curves(tables["robustness"], first.calibration) if config.robustness else (),
    )
    output = Place.at(config.output, config.s3)
    for name, table in tables.items():
        (output / f"{name}.parquet").write_parquet(table)
    (output / "figures.json").write(result.model_dump_json(indent=1) + "\n")
    write_page(config, run, tables["scores"], result, first.checkpoint.limits)
    return result


def _labels(rows: pa.Table, generated: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each readable row lies below a generated input. Raises InputError if a class has too few images."""
    if len(rows) == 0:
        raise InputError("No image could be read. The column `error_code` of the embeddings says why.")
    prefixes = tuple(f"{uri.rstrip('/')}/" for uri in generated)
    labels = np.array([uri.startswith(prefixes) or uri in generated for uri in rows["uri"].to_pylist()])
    if min(labels.sum(), (~labels).sum()) < 2:
        raise InputError("One class has fewer than two readable images; check --natural and --generated.")
    return labels


def _scores(rows: pa.Table, labels: NDArray[np.bool_], detectors: Sequence[Detector]) -> pa.Table:
    """One row for each image and variant: the file, score and p-value of each seed, and the baselines' suspicion."""
    both = embeddings_of(rows, detectors[0].checkpoint.segments, len(VARIANTS))
    baselines = fit_baselines(detectors[0].checkpoint)
    parts = []
    for variant, embedding in zip(VARIANTS, both, strict=True):
        columns = {name: rows[name] for name in _FILE_COLUMNS}
        if variant != VARIANTS[0]:
            side = pa.array(np.full(len(rows), ALIGNED_SIDE, np.int32))
            columns |= {"width": side, "height": side, "bytes": rows[ALIGNED_BYTES]}
            columns["format"] = pa.array(["JPEG"] * len(rows))
        columns |= {"variant": pa.array([variant] * len(rows)), "generated": pa.array(labels)}
        for at, detector in enumerate(detectors):
            scores = detector.score_embeddings(embedding)
            columns |= {seed_column("score", at): scores.score, seed_column("p_value", at): scores.p_value}
        columns |= {name: scorer(embedding).astype(np.float32) for name, scorer in baselines.items()}
        columns[METADATA_ONLY] = metadata_only(columns, labels).astype(np.float32)
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def metadata_only(columns: dict[str, Any], labels: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the suspicion [N] by the columns `format`, `width`, `height` and `bytes`, from `metadata_scores`."""
    width, height, size = (np.array(columns[name]).astype(float) for name in ("width", "height", "bytes"))
    numbers = np.c_[np.log(width * height), np.abs(np.log(width / height)), np.log(size / (width * height))]
    return metrics.metadata_scores(np.array(columns["format"].to_pylist()), numbers, labels)


def _robustness(config: EvaluateConfig, source: Run, scores: pa.Table, detector: Detector) -> pa.Table:
    """One row for each distortion, and for the original, of up to `config.robustness` images of each class.

    The n-th image of one class and the n-th of the other get the same draw.
    """
    originals = scores.filter(pc.equal(scores["variant"], VARIANTS[0]))
    draws: dict[str, int] = {}
    # row ids are hashes, so the first ones are a random sample that is the same in every run
    for generated in (False, True):
        ids = originals.filter(pc.equal(originals["generated"], generated))["row_id"].to_pylist()
        draws |= {row_id: at for at, row_id in enumerate(ids[: config.robustness])}
    rows = readable(distortions(config, source, draws, detector))
    known = originals.filter(pc.is_in(originals["row_id"], rows["row_id"]))
    names = ("row_id", "uri", "member", "group", "generated")
    cases = [((ORIGINAL, 0.0), {name: known[name].to_numpy() for name in ("score", "p_value")})]
    for case, embedding in zip(CASES, embeddings_of(rows, detector.checkpoint.segments, len(CASES)), strict=True):
        distorted = detector.score_embeddings(embedding)
        cases.append((case, {"score": distorted.score, "p_value": distorted.p_value}))
    tables = [
        pa.table(
            {name: known[name] for name in names}
            | {"draw": rows["draw"], "distortion": pa.array([case[0]] * len(known))}
            | {"level": pa.array([float(case[1])] * len(known)), **values}
        )
        for case, values in cases
    ]
    return pa.concat_tables(tables)


def _calibration(detectors: Sequence[Detector]) -> pa.Table:
    tables = []
    for detector in detectors:
        calibration = detector.calibration
        each = np.full(calibration.source_count, 1.0 / calibration.source_count)
        weights = each if calibration.weights is None else calibration.weights
        columns = {
            "model_id": [detector.checkpoint.model_id] * len(calibration.scores),
            "score": calibration.scores,
            "stratum": list(calibration.strata),
            "source": calibration.sources,
            "source_weight": weights[calibration.sources],
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _unreadable(run: Run) -> Counter[str]:
    """Images that could not be read, by error code."""
    return Counter(run.table(EMBEDDINGS).to_table(columns=["error_code"])["error_code"].drop_null().to_pylist())
