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
from clipflow_ray.evaluate.embeddings import EMBEDDINGS, GENERATED, distortions, embeddings_of, readable, variants
from clipflow_ray.evaluate.figures import METADATA_ONLY, ORIGINAL, curves, figures, seed_column, supported
from clipflow_ray.evaluate.record import EvaluationFigures
from clipflow_ray.evaluate.report import write_page
from clipflow_ray.evaluate.views import ALIGNED, ALIGNED_SIDE, AS_FOUND, CASES, SIZES, VARIANTS
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.place import Place, places, settled
from clipflow_ray.runs.folder import Run

_FILE_COLUMNS: Final = ("row_id", "uri", "member", "group", "width", "height", "format", "bytes")


def evaluate(config: EvaluateConfig) -> EvaluationFigures:
    """Evaluate `config.checkpoint` on labelled images and return the figures.

    Writes per-image scores, the figures and a page under `config.output`. Embeddings there are reused if nothing
    changed. `config.seeds` names checkpoints that differ in their seed alone; they give the spread over seeds. Raises
    ClipflowError, before any encoding if a setting is wrong or if a calibration is too small for the asked alpha.
    """
    config = settled(config, "natural", "generated", "output")
    if not config.natural or not config.generated:
        raise ConfigError("Name at least one --natural and one --generated input.")
    _check_labels(config)
    checkpoints = [load_checkpoint(at) for at in places((config.checkpoint, *config.seeds), config.s3)]
    if len({(checkpoint.encoder_fingerprint, checkpoint.segments) for checkpoint in checkpoints}) > 1:
        raise ConfigError("The checkpoints differ in encoder or segments; evaluate them one at a time.")
    # The figures of a checkpoint should not depend on the machine, so they are those of the training's precision.
    precision = next(iter(checkpoints[0].precisions), checkpoints[0].encoder.precision)
    first = Detector(checkpoints[0], precision=precision)
    detectors = [first, *(Detector(checkpoint, encoder=first.encoder) for checkpoint in checkpoints[1:])]
    calibrations = [detector.calibration for detector in detectors]
    alphas = supported(calibrations, config.alpha)
    resources.connect()
    run = variants(config, first)
    rows = readable(run)
    _check_classes(rows)
    tables = {"scores": _scores(rows, detectors), "calibration": _calibration(detectors)}
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
        **dict(figures(tables["scores"], calibrations, alphas)),
        unreadable=unreadable.total(),
        unreadable_by_code=dict(sorted(unreadable.items())),
        robustness=curves(tables["robustness"], calibrations[0], alphas) if config.robustness else (),
    )
    output = Place.at(config.output, config.s3)
    for name, table in tables.items():
        (output / f"{name}.parquet").write_parquet(table)
    (output / "figures.json").write(result.model_dump_json(indent=1) + "\n")
    write_page(config, run, tables["scores"], result, first.limits)
    return result


def _check_labels(config: EvaluateConfig) -> None:
    """Raise ConfigError if all images of a natural input would be generated ones as well."""
    natural, generated = (places(uris, config.s3) for uris in (config.natural, config.generated))
    for place in natural:
        if any(other.holds(place) for other in generated):
            raise ConfigError(
                f"{place.uri} is given as --natural and lies inside --generated, so its images would have both labels. "
                "Give each class files or folders of its own."
            )


def _check_classes(rows: pa.Table) -> None:
    """Raise InputError if a class has too few readable images."""
    if len(rows) == 0:
        raise InputError("No image could be read. The column `error_code` of the embeddings says why.")
    positive = pc.sum(rows[GENERATED]).as_py()
    if min(positive, len(rows) - positive) < 2:
        raise InputError("One class has fewer than two readable images; check --natural and --generated.")


def _scores(rows: pa.Table, detectors: Sequence[Detector]) -> pa.Table:
    """One row for each image and variant: the file, score and p-value of each seed, and the baselines' suspicion."""
    embeddings = embeddings_of(rows, detectors[0].checkpoint.segments, len(VARIANTS))
    baselines = fit_baselines(detectors[0].checkpoint)
    labels = rows[GENERATED].to_numpy()
    parts = []
    for variant, embedding in zip(VARIANTS, embeddings, strict=True):
        columns = file_columns(rows, variant)
        columns |= {"variant": pa.array([variant] * len(rows)), GENERATED: rows[GENERATED]}
        for at, detector in enumerate(detectors):
            scores = detector.score_embeddings(embedding)
            columns |= {seed_column("score", at): scores.score, seed_column("p_value", at): scores.p_value}
        columns |= {name: scorer(embedding).astype(np.float32) for name, scorer in baselines.items()}
        columns[METADATA_ONLY] = metadata_only(columns, labels).astype(np.float32)
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def file_columns(rows: pa.Table, variant: str) -> dict[str, Any]:
    """What is known of the file of each image in `variant`: format, size and bytes are those after its re-encoding."""
    columns = {name: rows[name] for name in _FILE_COLUMNS}
    if variant != AS_FOUND:
        columns |= {"format": pa.array(["JPEG"] * len(rows)), "bytes": rows[SIZES[variant]]}
    if variant == ALIGNED:
        columns |= dict.fromkeys(("width", "height"), pa.array(np.full(len(rows), ALIGNED_SIDE, np.int32)))
    return columns


def metadata_only(columns: dict[str, Any], labels: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the suspicion [N] by the columns `format`, `width`, `height` and `bytes`, from `metadata_scores`."""
    width, height, size = (np.array(columns[name]).astype(float) for name in ("width", "height", "bytes"))
    numbers = np.c_[np.log(width * height), np.abs(np.log(width / height)), np.log(size / (width * height))]
    return metrics.metadata_scores(np.array(columns["format"].to_pylist()), numbers, labels)


def _robustness(config: EvaluateConfig, source: Run, scores: pa.Table, detector: Detector) -> pa.Table:
    """One row for each distortion, and for the original, of up to `config.robustness` images of each class.

    The n-th image of one class and the n-th of the other get the same draw.
    """
    originals = scores.filter(pc.equal(scores["variant"], AS_FOUND))
    draws: dict[str, int] = {}
    # row ids are hashes, so the first ones are a random sample that is the same in every run
    for generated in (False, True):
        ids = originals.filter(pc.equal(originals[GENERATED], generated))["row_id"].to_pylist()
        draws |= {row_id: at for at, row_id in enumerate(ids[: config.robustness])}
    rows = readable(distortions(config, source, draws, detector))
    known = originals.filter(pc.is_in(originals["row_id"], rows["row_id"]))
    names = ("row_id", "uri", "member", "group", GENERATED)
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
