"""`score`: files, folders and patterns, on this machine or on a server."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from clipflow_ray.cli.exits import FAILED, TOO_MANY_ERRORS
from clipflow_ray.cli.options import (
    AsJson,
    Checkpoint,
    MaxBytes,
    MaxPixels,
    MaxSeconds,
    MaxSide,
    MinSide,
    Precision,
    given_limits,
    limit_options,
)
from clipflow_ray.config import DISCLAIMER, ImageLimits, PrecisionChoice
from clipflow_ray.errors import ClipflowError, ConfigError

_AT_ONCE: Final = 32
_COLUMNS: Final = (
    *("file", "group", "status", "verdict", "p_value", "score", "width", "height", "format", "sha256"),
    *("error_code", "error_message"),
)

_Judge = Callable[[list[bytes]], list[dict[str, Any]]]


@dataclass(frozen=True)
class _Image:
    """One image to score: what to call it, its group, and its bytes or what is wrong with it."""

    file: str
    group: str
    content: bytes | ClipflowError


def score(
    files: Annotated[
        list[str], typer.Argument(help="Image files, folders, s3:// prefixes, archives, tables, lists or patterns.")
    ],
    checkpoint: Checkpoint = None,
    precision: Precision = None,
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
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a csv table with one row an image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score images on this machine without Ray, or on a server. An image that fails does not stop the others."""
    flags = limit_options(max_pixels, max_side, min_side, max_bytes, max_seconds)
    if url and (checkpoint or precision or any(value is not None for value in flags.values())):
        raise ConfigError("Give --url without --checkpoint, --precision and limits: a server has its own.")
    limits = given_limits(flags)
    if as_csv and as_json:
        raise ConfigError("Give --csv or --json, not both.")
    table = csv.DictWriter(sys.stdout, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    if as_csv:
        table.writeheader()
    flagged, scored, failed, others = Counter[str](), Counter[str](), 0, Counter[str]()
    with _server(url, alpha) if url else _this_machine(checkpoint, precision, alpha, limits) as (judge, floor):
        for image, record in _judged(_images(files, limits, others), judge):
            failed += record["status"] != "ok"
            scored[image.group] += record["status"] == "ok"
            flagged[image.group] += record.get("verdict") == "likely_ai"
            if as_json:
                print(json.dumps({"file": image.file, **record}))
            elif as_csv:
                error = record.get("error") or {}
                table.writerow(
                    record
                    | {"file": image.file, "group": image.group}
                    | {f"error_{name}": error.get(name) for name in ("code", "message")}
                )
            else:
                print(f"{image.file}: {_sentence(record)}")
    if not (as_json or as_csv) and scored.total() > 1:
        _print_rates(flagged, scored)
    for reason, count in others.items():
        print(f"left out: {count} {reason}", file=sys.stderr)
    print(f"{DISCLAIMER} {floor}", file=sys.stderr)
    if not scored.total():
        print("Nothing was scored.", file=sys.stderr)
        sys.exit(FAILED)
    if failed:
        print(f"{failed} of {failed + scored.total()} images could not be scored.", file=sys.stderr)
        sys.exit(TOO_MANY_ERRORS)


def _images(names: Sequence[str], limits: ImageLimits, others: Counter[str]) -> Iterator[_Image]:
    """The images that the names stand for; `others` counts what is no image and does not call itself one."""
    from clipflow_ray.config import InventoryOptions
    from clipflow_ray.errors import NotAnImage
    from clipflow_ray.inputs.listing import rows
    from clipflow_ray.inputs.reading import read_row
    from clipflow_ray.place import Place

    options = InventoryOptions()
    for name in names:
        try:
            place = Place.at(name)
            for row in rows([place], options):
                at = name if row["uri"] == place.uri else _short(row["uri"])
                file = f"{at} : {row['member']}" if row["member"] else at
                group = Path(row["uri"]).parent.name if row["uri"] == place.uri else row["group"]
                try:
                    yield _Image(file, group, read_row(row, place, options, limits))
                except NotAnImage:
                    others["files that are no images"] += 1
                except ClipflowError as error:
                    yield _Image(file, group, error)
        except ClipflowError as error:
            yield _Image(name, "", error)


def _judged(images: Iterator[_Image], judge: _Judge) -> Iterator[tuple[_Image, dict[str, Any]]]:
    """Each image with its result, in order. Images are judged a few at a time, because all may not fit into memory."""
    count = 0
    while chunk := list(islice(images, _AT_ONCE)):
        contents = [image.content for image in chunk if isinstance(image.content, bytes)]
        results = iter(judge(contents) if contents else [])
        for number, image in enumerate(chunk, count):
            failed = _failure(image.content) if isinstance(image.content, ClipflowError) else None
            yield image, (failed or next(results)) | {"index": number}
        count += len(chunk)


@contextmanager
def _this_machine(
    checkpoint: str | None, precision: PrecisionChoice | None, alpha: float | None, limits: ImageLimits
) -> Iterator[tuple[_Judge, str]]:
    from clipflow_ray import load_detector
    from clipflow_ray.model.calibration import floor_in_words

    detector = load_detector(checkpoint, precision=precision or "auto", limits=limits)
    print(f"encoded in {detector.checkpoint.encoder.precision}", file=sys.stderr)

    def judge(contents: list[bytes]) -> list[dict[str, Any]]:
        findings = detector.detect(contents) if alpha is None else detector.detect(contents, alpha)
        return [asdict(finding) for finding in findings]

    yield judge, floor_in_words(len(detector.calibration.scores))


@contextmanager
def _server(url: str, alpha: float | None) -> Iterator[tuple[_Judge, str]]:
    from clipflow_ray.client import Client
    from clipflow_ray.model.calibration import floor_in_words

    with Client(url) as client:
        model = client.model()
        most = model.limits.max_images

        def judge(contents: list[bytes]) -> list[dict[str, Any]]:
            chunks = [contents[at : at + most] for at in range(0, len(contents), most)]
            answers = [result for chunk in chunks for result in client.detect(chunk, alpha).results]
            return [result.model_dump(exclude_none=True, exclude={"id"}) for result in answers]

        yield judge, floor_in_words(model.calibration_n)


def _failure(error: ClipflowError) -> dict[str, Any]:
    code = getattr(error, "item_code", error.code)
    return {"status": "error", "error": {"code": code, "message": str(error)}}


def _sentence(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"error {record['error']['code']}: {record['error']['message']}"
    return f"{record['verdict']} (p {record['p_value']:.4f}, score {record['score']:.4f})"


def _print_rates(flagged: Counter[str], scored: Counter[str]) -> None:
    """A table with the flagged share of each group, and of all images."""
    rows = [(group, flagged[group], count) for group, count in sorted(scored.items()) if count]
    if len(rows) > 1:
        rows.append(("all", flagged.total(), scored.total()))
    width = max(len("group"), *(len(group) for group, _, _ in rows))
    print(f"\n{'group':{width}}  flagged      of   share")
    for group, hits, count in rows:
        print(f"{group:{width}}  {hits:7}  {count:6}  {hits / count:6.1%}")


def _short(uri: str) -> str:
    """A path below the working folder is shown from there."""
    path = Path(uri)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else uri
