"""`score`: a few files, on this machine or on a server."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from clipflow_ray.cli.options import (
    AsJson,
    Checkpoint,
    MaxBytes,
    MaxPixels,
    MaxSeconds,
    MaxSide,
    MinSide,
    given_limits,
    limit_options,
)
from clipflow_ray.config import DISCLAIMER, ImageLimits
from clipflow_ray.errors import ConfigError

_Result = tuple[dict[str, Any], str]  # of one image: what is printed with --json, and without


def score(
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Checkpoint = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="False-positive rate to flag at; default 0.01, or the server's with --url."),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Score on this server. Its token is read from CLIPFLOW_TOKEN.")
    ] = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    min_side: MinSide = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Score a few image files on this machine without Ray, or on a server."""
    flags = limit_options(max_pixels, max_side, min_side, max_bytes, max_seconds)
    if url and (checkpoint or any(value is not None for value in flags.values())):
        raise ConfigError("Give --url without --checkpoint and without limits: a server has its own.")
    limits = given_limits(flags)
    results, floor = _score_on_server(url, files, alpha) if url else _score_here(files, checkpoint, alpha, limits)
    for path, (record, sentence) in zip(files, results, strict=True):
        print(json.dumps({"file": str(path), **record}) if as_json else f"{path}: {sentence}")
    print(f"{DISCLAIMER} {floor}", file=sys.stderr)


def _score_here(
    files: list[Path], checkpoint: str | None, alpha: float | None, limits: ImageLimits
) -> tuple[list[_Result], str]:
    from clipflow_ray import load_detector
    from clipflow_ray.model.calibration import floor_in_words

    try:
        data = [path.read_bytes() for path in files]
    except OSError as error:
        raise ConfigError(f"Cannot read {error.filename}: {error.strerror}.") from error
    detector = load_detector(checkpoint, limits=limits)
    findings = detector.detect(data) if alpha is None else detector.detect(data, alpha)
    results = [
        (
            asdict(finding),
            _failure(finding.error["code"], finding.error["message"])
            if finding.error
            else _judgement(finding.verdict, finding.p_value, finding.score),
        )
        for finding in findings
    ]
    return results, floor_in_words(len(detector.calibration.scores))


def _score_on_server(url: str, files: list[Path], alpha: float | None) -> tuple[list[_Result], str]:
    from clipflow_ray.client import Client
    from clipflow_ray.model.calibration import floor_in_words

    with Client(url) as client:
        model = client.model()
        most = model.limits.max_images
        chunks = [files[at : at + most] for at in range(0, len(files), most)]
        answers = [result for chunk in chunks for result in client.detect(chunk, alpha).results]
    results = [
        (
            result.model_dump(exclude_none=True),
            _failure(result.error.code, result.error.message)
            if result.error
            else _judgement(result.verdict, result.p_value, result.score),
        )
        for result in answers
    ]
    return results, floor_in_words(model.calibration_n)


def _failure(code: str, message: str) -> str:
    return f"error {code}: {message}"


def _judgement(verdict: str | None, p_value: float | None, score: float | None) -> str:
    return f"{verdict} (p {p_value:.4f}, score {score:.4f})"
