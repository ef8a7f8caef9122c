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
from clipflow_ray.config import EncoderConfig
from clipflow_ray.data.reading import VIEW
from clipflow_ray.errors import EncoderMismatchError
from clipflow_ray.images import Pixels
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint
from clipflow_ray.model.detector import Detector, Scores
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.finding import non_finite

_SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def stacked_views(values: Sequence[bytes], size: int) -> Pixels:
    """View bytes of N rows -> uint8 [N, size, size, 3]."""
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, size, size, 3)


class Score:
    """Actor: views -> log-likelihood, score and p-values, by the detector of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, cpus: int) -> None:
        torch.set_num_threads(1)
        self._detector = Detector(checkpoint, threads=cpus)
        self._images = Counter("clipflow_images", "Images by outcome.", ("status", "error_code"))
        self._encoding = Histogram("clipflow_encode_seconds", "Seconds of one encoder batch.", _SECONDS)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Described rows -> the same rows with the columns of the scoring stage, which replace `view`."""
        views = [view.as_buffer() for view in table[VIEW].drop_null()]
        scores = None
        if views:
            start = time.monotonic()
            scores = self._detector.score_views(stacked_views(views, self._detector.checkpoint.view.size))
            self._encoding.observe(time.monotonic() - start)
        table = scored(table, scores, self._detector.calibration)
        outcomes = Outcomes(zip(table["status"].to_pylist(), table["error_code"].to_pylist(), strict=True))
        for (status, code), count in outcomes.items():
            self._images.inc(count, {"status": status, "error_code": code or ""})
        return table


def scored(table: pa.Table, scores: Scores | None, calibration: Calibration) -> pa.Table:
    """Described rows -> the same rows with the columns of the scoring stage, which replace `view`.

    `scores` are those of the rows with a view, in their order. A row without a view has no
    scores. If the score of a view is not finite, its row becomes an error. `scores` may be None if no row has a view.
    """
    present = table[VIEW].is_valid().to_numpy().astype(bool)
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


class Embed:
    """Actor: rows with one or more views -> one flat float32 list per row and feature, [views x width]."""

    def __init__(self, encoder: EncoderConfig, features: tuple[str, ...], fingerprint: str, cpus: int) -> None:
        torch.set_num_threads(1)
        self._encoder = Encoder(encoder, features=features, threads=cpus)
        if self._encoder.fingerprint != fingerprint:
            raise EncoderMismatchError(
                f"This node's encoder is {self._encoder.fingerprint}, the driver's is {fingerprint}. "
                "Their weights differ: give every node the same weights."
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with `view` as the bytes of one or more views -> the same rows with a column per feature."""
        values = [view.as_buffer() for view in table[VIEW]]
        size = self._encoder.view.size
        counts = [len(value) // (3 * size * size) for value in values]
        table = table.drop_columns([VIEW])
        outputs = self._encoder(stacked_views(values, size)) if sum(counts) else {}
        for name in self._encoder.names:
            output = outputs.get(name, np.empty((0, 0), np.float32))
            parts: list[NDArray[np.float32]] = np.split(output, np.cumsum(counts)[:-1])
            column = pa.array([part.ravel() for part in parts], pa.large_list(pa.float32()))
            table = table.append_column(name, column)
        return table
