"""The only scoring path: bytes -> Finding. Audits and servers call the same methods on the same views."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, overload

import numpy as np

from clipflow_ray import pictures, sandbox
from clipflow_ray.config import CAP_PRONE_STRATA, ImageLimits, PrecisionChoice
from clipflow_ray.errors import EncoderMismatchError, ItemError
from clipflow_ray.images import DecodedImage
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.encoder import Encoder, device_for
from clipflow_ray.model.extractor import F32, Extractor, Images, joined
from clipflow_ray.model.finding import FileFacts, Finding, judged, refused
from clipflow_ray.model.precision import at_precision, bfloat16_on
from clipflow_ray.model.scorer import Scorer, Scores
from clipflow_ray.pictures import Picture
from clipflow_ray.recognise import HEAD, claims_image, picture_kind

log = logging.getLogger(__name__)
_BATCH: Final = 32


@dataclass(frozen=True)
class Embeddings:
    """Raw embeddings of N images.

    `values` is float32 [N, D]. A row holds the outputs of the checkpoint's segments, one after the other; D is the sum
    of `checkpoint.widths`. If an image has no embedding, its row is NaN and `errors` holds its error by its index.
    """

    values: F32
    errors: dict[int, ItemError]


class Detector:
    """Encoder, flow and calibration of one checkpoint, at one precision.

    `threads` is passed to the encoder. `precision` is that of the encoder; see `model.precision.at_precision` for
    `auto`. `checkpoint` is the given one at that precision, and p-values come from its calibration for it. Detectors
    whose checkpoints have the same encoder can share one: pass it as `encoder`, and its precision is taken. An image
    beyond `limits` is not scored. Raises EncoderMismatchError if the encoder differs from the one that the checkpoint
    was made with, and CalibrationError if the checkpoint has no calibration for the precision.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        threads: int | None = None,
        encoder: Extractor | None = None,
        precision: PrecisionChoice = "auto",
        limits: ImageLimits | None = None,
    ) -> None:
        self.limits = limits or ImageLimits()
        if encoder is None:
            checkpoint, _ = at_precision(checkpoint, precision, lambda: bfloat16_on(device_for(device)))
        else:
            checkpoint = checkpoint.of_encoder(encoder.fingerprint)
        self._scorer = Scorer(checkpoint, device_for(device))
        self.checkpoint = checkpoint
        self.calibration: Calibration = self._scorer.calibration
        self.encoder: Extractor = encoder or Encoder(checkpoint.encoder, checkpoint.segments, device, threads)
        if self.encoder.fingerprint != checkpoint.encoder_fingerprint:
            raise EncoderMismatchError(
                f"The checkpoint was made with encoder {checkpoint.encoder_fingerprint}, "
                f"this one is {self.encoder.fingerprint}: its weights or preprocessing differ. Use the same weights."
            )
        given = dict(zip(self.encoder.names, self.encoder.widths, strict=True))
        wanted = {each.output: width for each, width in zip(checkpoint.segments, checkpoint.widths, strict=True)}
        if any(given.get(name) != width for name, width in wanted.items()):
            raise EncoderMismatchError(f"The checkpoint needs the outputs {wanted}, this encoder gives {given}.")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | None = None,
        precision: PrecisionChoice = "auto",
        limits: ImageLimits | None = None,
    ) -> "Detector":
        """Load a checkpoint directory and its encoder weights (fetched once per machine)."""
        return cls(load_checkpoint(path), device, precision=precision, limits=limits)

    @overload
    def detect(  # type: ignore[overload-overlap]  # a str is a path here, although it is a sequence of str too
        self, data: Picture, alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA
    ) -> Finding: ...
    @overload
    def detect(
        self, data: Sequence[Picture], alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA
    ) -> list[Finding]: ...
    def detect(
        self, data: Picture | Sequence[Picture], alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA
    ) -> Finding | list[Finding]:
        """Judge one picture or several at the false-positive rate `alpha`.

        A picture is bytes, the path of a file, a binary file object, a PIL image, or a uint8 array [height, width, 3].
        Pixels without a file are judged as a PNG of these pixels.

        With `cap_prone_strata`, an image whose format and size is prone to false alarms at `alpha` is at most
        `inconclusive`; see `Calibration.prone_strata`. A bad image or a file that cannot be read gives a Finding with
        status `error`, never an exception. Raises CalibrationError if alpha is too small for the calibration, and
        TypeError at once if something else than pictures is given.
        """
        rule = self.calibration.rule(alpha, cap_prone_strata)
        if pictures.is_picture(data):
            return next(self._findings([data], rule, 0))
        given = pictures.pictures(data)
        chunks = (given[at : at + _BATCH] for at in range(0, len(given), _BATCH))
        return [f for at, chunk in enumerate(chunks) for f in self._findings(chunk, rule, at * _BATCH)]

    def detect_folder(
        self, folder: str | os.PathLike[str], alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA
    ) -> dict[Path, Finding]:
        """Judge every image below `folder`, as `detect` does, in the order of the paths.

        A file that neither is an image nor has the name of one is left out, and a warning is logged with the number of
        these. Links to folders are not followed. Raises NotADirectoryError if `folder` is none.
        """
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"{os.fspath(folder)} is not a folder.")
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        images = [path for path in files if _is_or_claims_image(path)]
        if len(images) < len(files):
            log.warning("%d files below %s are no images and were left out.", len(files) - len(images), folder)
        return dict(zip(images, self.detect(images, alpha, cap_prone_strata), strict=True))

    def embed(self, data: Sequence[Picture]) -> Embeddings:
        """N pictures, as `detect` takes them -> their embeddings.

        A bad image gives an error in the result, never an exception. Raises TypeError as `detect` does.
        """
        given = pictures.pictures(data)
        values = np.full((len(given), sum(self.checkpoint.widths)), np.nan, np.float32)
        errors: dict[int, ItemError] = {}
        for start in range(0, len(given), _BATCH):
            _, decoded = self._decoded(given[start : start + _BATCH])
            numbered = list(enumerate(decoded, start))
            errors |= {at: image for at, image in numbered if isinstance(image, ItemError)}
            views = {at: image.rgb for at, image in numbered if isinstance(image, DecodedImage)}
            if views:
                values[[*views]] = joined(self.encoder([*views.values()]), self.checkpoint.segments)
        return Embeddings(values, errors)

    def score_views(self, views: Images) -> Scores:
        """uint8 [N, view.bytes], packed by `images.views` -> Scores. A score depends on its own image alone."""
        return self.score_embeddings(joined(self.encoder(views), self.checkpoint.segments))

    def score_embeddings(self, embeddings: F32) -> Scores:
        """float32 [N, D] raw embeddings -> Scores. A row of NaN gives NaN."""
        return self._scorer(embeddings)

    def _findings(self, chunk: Sequence[Picture], rule: Rule, start: int) -> Iterator[Finding]:
        contents, decoded = self._decoded(chunk)
        good = [image.rgb for image in decoded if isinstance(image, DecodedImage)]
        numbers = iter(self.score_views(good).rows() if good else [])
        for index, (data, image) in enumerate(zip(contents, decoded, strict=True), start):
            digest = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None
            if isinstance(image, ItemError):
                yield refused(index, digest, image)
            else:
                yield judged(index, digest, FileFacts.of(image), next(numbers), rule, max(self.checkpoint.view.sizes))

    def _decoded(self, chunk: Sequence[Picture]) -> tuple[list[bytes | ItemError], list[DecodedImage | ItemError]]:
        """Of each picture its encoded bytes and its views, or the error in their place."""
        contents: list[bytes | ItemError] = []
        for picture in chunk:
            try:
                contents.append(pictures.encoded(picture, self.limits.max_bytes))
            except ItemError as error:
                contents.append(error)
        read = [data for data in contents if isinstance(data, bytes)]
        decoded = iter(sandbox.decode_all(read, self.limits, self.checkpoint.view))
        return contents, [next(decoded) if isinstance(data, bytes) else data for data in contents]


def _is_or_claims_image(path: Path) -> bool:
    if claims_image(path.name):
        return True
    try:
        with path.open("rb") as file:
            return picture_kind(file.read(HEAD)) is not None
    except OSError:
        return False
