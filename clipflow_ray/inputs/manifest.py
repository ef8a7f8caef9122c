"""Ray tasks list the inputs into a manifest: parquet files with one row for each image.

Each task writes the rows of one source. The driver receives only counts, so its memory does not grow with the input.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Final

import ray

from clipflow_ray.columns import manifest_table
from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import Source
from clipflow_ray.inputs.listing import check_apart, rows_of, sources
from clipflow_ray.place import Place

_ROWS_PER_FILE: Final = 100_000
_ROWS_PER_GROUP: Final = 10_000


def write_manifest(inputs: Sequence[Place], folder: Place, options: InventoryOptions | None = None) -> int:
    """List `inputs` into parquet files in `folder`, with one task for each source. Returns the number of rows.

    An object that two inputs hold is listed once. A list gives one row for each of its lines, even if lines repeat.
    Raises InputError if an input holds nothing, if it cannot be listed, or if `folder` lies inside it.
    """
    wanted = options or InventoryOptions()
    check_apart(inputs, folder)
    folder.make_folder()
    task = ray.remote(num_cpus=1)(write_source)
    found = sources(inputs, wanted)
    try:
        written = ray.get([task.remote(source, at, folder, wanted) for at, source in enumerate(found)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    kept = {name for names, _ in written for name in names}
    for name in folder.names():
        if name.startswith("part-") and name not in kept:  # from an interrupted listing, when the input held more
            (folder / name).delete()
    count = sum(rows for _, rows in written)
    if count == 0:
        held = ", ".join(place.uri for place in inputs)
        raise InputError(f"{held} hold no images: check the path, or the prefix and its bucket.")
    return count


def write_source(source: Source, number: int, folder: Place, options: InventoryOptions) -> tuple[list[str], int]:
    """List one source into `part-<number>-<k>.parquet` in `folder`; returns the file names and the number of rows."""
    names: list[str] = []
    count, listed = 0, rows_of(source, options)
    while chunk := list(islice(listed, _ROWS_PER_FILE)):
        names.append(f"part-{number:05d}-{len(names):05d}.parquet")
        (folder / names[-1]).write_parquet(manifest_table(chunk), _ROWS_PER_GROUP)
        count += len(chunk)
    return names, count
