"""The evaluation protocol: natural and generated images -> figures, with baselines on the same embeddings.

Nothing here feeds back into a checkpoint: thresholds come from its own calibration, and no choice is made.

scores.parquet       one row an image and variant: what every figure but the curves is derived from
robustness.parquet   one row an image and distortion, where robustness was asked for
calibration.parquet  the calibration scores of each checkpoint
figures.json         the figures; report.html shows them
evaluation/, robustness-N/   embeddings, reused when nothing changed
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
    """Figures of `config.checkpoint` on labelled images.

    Writes per-image scores, the figures and a page under `config.output`; embeddings there are reused when nothing
    changed. Each of `config.seeds` is a checkpoint that differs in its seed alone, for the spread. Raises
    ClipflowError.
    """
    config = settled(config, "natural", "generated", "output")
    if not config.natural or not config.generated:
        raise ConfigError("Name at least one --natural and one --generated input.")
    checkpoints = [load_checkpoint(at) for at in places((config.checkpoint, *config.seeds), config.s3)]
    if len({(checkpoint.encoder_fingerprint, checkpoint.encoder.feature) for checkpoint in checkpoints}) > 1:
        raise ConfigError("The checkpoints differ in encoder or feature; evaluate them one at a time.")
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
    """Which readable rows lie below a generated input; raises InputError where a class cannot be measured."""
    if len(rows) == 0:
        raise InputError("No image could be read; look at the error codes of the embeddings.")
    prefixes = tuple(f"{uri.rstrip('/')}/" for uri in generated)
    labels = np.array([uri.startswith(prefixes) or uri in generated for uri in rows["uri"].to_pylist()])
    if min(labels.sum(), (~labels).sum()) < 2:
        raise InputError("One of the two classes has fewer than two readable images.")
    return labels


def _scores(rows: pa.Table, labels: NDArray[np.bool_], detectors: Sequence[Detector]) -> pa.Table:
    """One row an image and variant: the file, each seed's score and p-value, and the baselines' suspicion."""
    both = embeddings_of(rows, detectors[0].encoder.names, len(VARIANTS))
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
    """Suspicion [N] by format, size, aspect and bytes per pixel, from the columns of those names; cross-validated."""
    width, height, size = (np.array(columns[name]).astype(float) for name in ("width", "height", "bytes"))
    numbers = np.c_[np.log(width * height), np.abs(np.log(width / height)), np.log(size / (width * height))]
    return metrics.metadata_scores(np.array(columns["format"].to_pylist()), numbers, labels)


def _robustness(config: EvaluateConfig, source: Run, scores: pa.Table, detector: Detector) -> pa.Table:
    """One row an image and distortion, for up to `config.robustness` images of each class, and their originals.

    The n-th image of one class and the n-th of the other get the same draw.
    """
    originals = scores.filter(pc.equal(scores["variant"], VARIANTS[0]))
    draws: dict[str, int] = {}
    for generated in (False, True):  # row ids are hashes: the first ones are a random sample, the same in every run
        ids = originals.filter(pc.equal(originals["generated"], generated))["row_id"].to_pylist()
        draws |= {row_id: at for at, row_id in enumerate(ids[: config.robustness])}
    rows = readable(distortions(config, source, draws, detector))
    known = originals.filter(pc.is_in(originals["row_id"], rows["row_id"]))
    names = ("row_id", "uri", "member", "group", "generated")
    cases = [((ORIGINAL, 0.0), {name: known[name].to_numpy() for name in ("score", "p_value")})]
    for case, embedding in zip(CASES, embeddings_of(rows, detector.encoder.names, len(CASES)), strict=True):
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
    return pa.concat_tables(
        pa.table(
            {
                "model_id": [detector.checkpoint.model_id] * len(detector.calibration.scores),
                "score": detector.calibration.scores,
                "stratum": list(detector.calibration.strata),
            }
        )
        for detector in detectors
    )


def _unreadable(run: Run) -> Counter[str]:
    """Images that could not be read, by error code."""
    return Counter(run.table(EMBEDDINGS).to_table(columns=["error_code"])["error_code"].drop_null().to_pylist())
