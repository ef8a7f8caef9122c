"""Ray Data actors that hold the encoder: views -> scores or embeddings."""

import time
from collections import Counter as Outcomes
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from ray.util.metrics import Counter, Histogram

from clipflow_ray.columns import add_columns
from clipflow_ray.config import EncoderConfig, Segment, slots
from clipflow_ray.data.reading import VIEW
from clipflow_ray.errors import EncoderMismatchError
from clipflow_ray.images import Pixels, by_size
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.extractor import F32, joined
from clipflow_ray.model.finding import non_finite
from clipflow_ray.model.scorer import Scores

Mask = NDArray[np.bool_]

_SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def stacked_views(values: Sequence[bytes], size: int) -> Pixels:
    """Packed views of N images, in rows of one or more images -> uint8 [N, size]; `size` is the bytes of one image."""
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, size)


class Score:
    """Actor: views -> log-likelihood, score and p-values, by the detector of one checkpoint at its precision.

    With `keep_embeddings`, it adds the columns of `embedding_columns` too.
    """

    def __init__(self, checkpoint: Checkpoint, keep_embeddings: bool, cpus: int) -> None:
        torch.set_num_threads(1)
        self._detector = Detector(checkpoint, threads=cpus, precision=checkpoint.encoder.precision)
        self._keep = keep_embeddings
        self._images = Counter("clipflow_images", "Images by outcome.", ("status", "error_code"))
        self._encoding = Histogram("clipflow_encode_seconds", "Seconds of one encoder batch.", _SECONDS)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Described rows -> the same rows with the columns of the scoring stage, which replace `view`."""
        present = table[VIEW].is_valid().to_numpy().astype(bool)
        segments = self._detector.checkpoint.segments
        embeddings: dict[str, F32] = {}
        scores = None
        if present.any():
            start = time.monotonic()
            views = [view.as_buffer() for view in table[VIEW].drop_null()]
            embeddings = self._detector.encoder(stacked_views(views, self._detector.checkpoint.view.bytes))
            scores = self._detector.score_embeddings(joined(embeddings, segments))
            self._encoding.observe(time.monotonic() - start)
        table = scored(table, present, scores, self._detector.calibration)
        if self._keep:
            table = with_embeddings(table, present, embeddings, self._detector.checkpoint)
        outcomes = Outcomes(zip(table["status"].to_pylist(), table["error_code"].to_pylist(), strict=True))
        for (status, code), count in outcomes.items():
            self._images.inc(count, {"status": status, "error_code": code or ""})
        return table


def scored(table: pa.Table, present: Mask, scores: Scores | None, calibration: Calibration) -> pa.Table:
    """Described rows -> the same rows with the columns of the scoring stage, which replace `view`.

    `present`, bool [N], tells which rows have an embedding, and `scores` are those of these rows, in their order. They
    may be None if there is no such row. The other rows get no scores. A row whose score is not finite becomes an error.
    """
    numbers = {field.name: np.full(len(table), np.nan, np.float32) for field in fields(Scores)}
    if scores is not None:
        for name, values in numbers.items():
            values[present] = getattr(scores, name)
    strata = [name or "" for name in table["stratum"].to_pylist()]
    broken = present & np.isnan(numbers["score"])
    error = non_finite()
    errors = {"status": "error", "error_code": error.item_code, "error_message": str(error)}
    columns: dict[str, Any] = {
        **numbers,
        "p_stratum": calibration.p_stratum(numbers["score"], strata),
        "scored_at": [datetime.now(UTC).isoformat(timespec="seconds")] * len(table),
        **{
            name: [new if bad else old for bad, old in zip(broken, table[name].to_pylist(), strict=True)]
            for name, new in errors.items()
        },
    }
    return add_columns(table, "scoring", columns)


def embedding_columns(checkpoint: Checkpoint) -> dict[str, pa.DataType]:
    """The columns of a file of kept embeddings besides `row_id`: one for each output of the encoder, by its name."""
    pairs = zip(checkpoint.segments, checkpoint.widths, strict=True)
    return {segment.output: pa.list_(pa.float16(), width) for segment, width in pairs}


def with_embeddings(table: pa.Table, present: Mask, embeddings: dict[str, F32], checkpoint: Checkpoint) -> pa.Table:
    """`table` with the columns of `embedding_columns`; null in a row that has no finite score.

    `present` is as in `scored`, and `embeddings` are float32 [number of present rows, width] by output. Values beyond
    the range of float16 are stored as its largest.
    """
    kept = table["score"].is_valid().to_numpy().astype(bool)
    largest = np.finfo(np.float16).max
    for name, kind in embedding_columns(checkpoint).items():
        values = np.zeros((len(table), kind.list_size), np.float16)
        if present.any():
            values[kept] = np.clip(embeddings[name], -largest, largest)[kept[present]]
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), kind.list_size, mask=pa.array(~kept))
        table = table.append_column(name, column)
    return table


class Embed:
    """Actor: rows with one or more images -> one flat float32 list per row and segment, [images x width].

    For each of its images a row holds the views of `slots(segments)`, one after the other. Null stands for no image.
    """

    def __init__(self, encoder: EncoderConfig, segments: tuple[Segment, ...], fingerprint: str, cpus: int) -> None:
        torch.set_num_threads(1)
        self._segments = segments
        self._slots = slots(segments)
        self._sizes = [size for size, _ in self._slots]
        self._bytes = sum(3 * size * size for size in self._sizes)
        self._encoder = Encoder(encoder, segments, threads=cpus)
        if self._encoder.fingerprint != fingerprint:
            raise EncoderMismatchError(
                f"This node's encoder is {self._encoder.fingerprint}, the driver's is {fingerprint}. "
                "Their weights differ: give every node the same weights."
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with `view` as the bytes of their views -> the same rows with a column per segment."""
        values = [view.as_buffer() if view.is_valid else b"" for view in table[VIEW]]
        counts = [len(value) // self._bytes for value in values]
        table = table.drop_columns([VIEW])
        embedded = self._embedded(stacked_views(values, self._bytes)) if sum(counts) else {}
        for segment in self._segments:
            output = embedded.get(segment.name, np.empty((0, 0), np.float32))
            parts: list[NDArray[np.float32]] = np.split(output, np.cumsum(counts)[:-1])
            column = pa.array([part.ravel() for part in parts], pa.large_list(pa.float32()))
            table = table.append_column(segment.name, column)
        return table

    def _embedded(self, views: Pixels) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, bytes of the slots] -> float32 [N, width] for each segment, by its name."""
        embedded: dict[str, NDArray[np.float32]] = {}
        for slot, pixels in zip(self._slots, by_size(views, self._sizes), strict=True):
            own = [each for each in self._segments if (each.size, each.training) == slot]
            outputs = self._encoder.encode(pixels, own)
            embedded |= {each.name: outputs[each.output] for each in own}
        return embedded
