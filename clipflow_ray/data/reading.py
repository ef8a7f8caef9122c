"""Ray Data tasks that read and decode images: manifest rows -> described rows with a view.

Batches are Arrow tables. A row that cannot be read or decoded keeps its place with status `error`; its view is null.
This module must not import torch, which would delay the first image of a worker process by seconds.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray import sandbox
from clipflow_ray.columns import Status, add_columns
from clipflow_ray.config import ImageLimits, InventoryOptions, ViewSpec
from clipflow_ray.errors import ItemError
from clipflow_ray.images import DecodedImage
from clipflow_ray.inputs.reading import read_bytes
from clipflow_ray.model.finding import FileFacts
from clipflow_ray.place import Place

Mask = NDArray[np.bool_]

VIEW: Final = "view"


@dataclass(frozen=True)
class ReadImage:
    """One object after reading and decoding.

    `sha256` and `bytes` are the hash and number of its bytes, or None if they were not read. `image` is the decoded
    image or the error, or None if the object is not read.
    """

    sha256: str | None
    bytes: int | None
    image: DecodedImage | ItemError | None


def read_images(
    table: pa.Table,
    near: Place,
    limits: ImageLimits,
    spec: ViewSpec | None = None,
    options: InventoryOptions | None = None,
    chosen: Mask | None = None,
) -> list[ReadImage]:
    """Read and decode the objects of N manifest rows, in their order. Reads run in parallel; decoding uses one core.

    `near` is any place that is reached with the same options as the rows' URIs. With `spec`, the `rgb` of an image is
    its view. `options` are the options with which the rows were listed. Only the objects that `chosen` [N] selects are
    read; by default all are.
    """
    chosen = np.ones(len(table), bool) if chosen is None else chosen
    contents = read_bytes(table.filter(chosen), near, limits, options)
    decoded = iter(sandbox.decode_all([c for c in contents if isinstance(c, bytes)], limits, spec))
    outcomes = [ReadImage(None, None, None)] * len(table)
    for at, content in zip(np.flatnonzero(chosen), contents, strict=True):
        if isinstance(content, bytes):
            outcomes[at] = ReadImage(hashlib.sha256(content).hexdigest(), len(content), next(decoded))
        else:
            outcomes[at] = ReadImage(None, None, content)
    return outcomes


def described(table: pa.Table, outcomes: Sequence[ReadImage], views: Sequence[bytes | None]) -> pa.Table:
    """Manifest rows -> described rows: the same rows with the columns of the reading stage.

    `outcomes` and `views` have one entry per row.
    """
    facts = [FileFacts.of(o.image) if isinstance(o.image, DecodedImage) else None for o in outcomes]
    errors = [o.image if isinstance(o.image, ItemError) else None for o in outcomes]
    values: dict[str, Sequence[Any]] = {
        "sha256": [o.sha256 for o in outcomes],
        "bytes": [o.bytes for o in outcomes],
        **{field.name: [f and getattr(f, field.name) for f in facts] for field in fields(FileFacts)},
        "stratum": [f and f.stratum for f in facts],
        "status": [_status(o.image) for o in outcomes],
        "error_code": [e and e.item_code for e in errors],
        "error_message": [e and str(e) for e in errors],
        VIEW: views,
    }
    return add_columns(table, "reading", values)


def read_and_decode(
    table: pa.Table,
    near: Place,
    limits: ImageLimits,
    spec: ViewSpec,
    options: InventoryOptions | None = None,
    sample: float = 1.0,
) -> pa.Table:
    """Manifest rows -> described rows with the encoder's view as bytes (uint8 S x S x 3), null on error.

    Only the fraction `sample` of the rows is read. The row id decides, so every run reads the same rows, and a larger
    sample includes a smaller one. The other rows get the status skipped_sample.
    """
    chosen = np.array([int(identity[:8], 16) < sample * 2**32 for identity in table["row_id"].to_pylist()], bool)
    outcomes = read_images(table, near, limits, spec, options, chosen)
    views = [o.image.rgb.tobytes() if isinstance(o.image, DecodedImage) else None for o in outcomes]
    return described(table, outcomes, views)


def _status(image: DecodedImage | ItemError | None) -> Status:
    if image is None:
        return "skipped_sample"
    return "error" if isinstance(image, ItemError) else "ok"
