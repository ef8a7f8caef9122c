"""Ray tasks list the inputs into a manifest: parquet files with one row for each image.

Each task writes the rows of one source. The driver receives only counts, so its memory does not grow with the input.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import ray

from clipflow_ray.columns import manifest_table
from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import Row, Source
from clipflow_ray.inputs.listing import check_apart, rows_of, say, sources
from clipflow_ray.place import Place

_ROWS_PER_FILE: Final = 100_000
_ROWS_PER_GROUP: Final = 10_000


@dataclass
class Listed:
    """What one task has listed: the files with its rows, the sources that it found, and counts.

    `rows` counts by input format, `left_out` by reason. `to_read` rows may be images; `problem` is that of the first
    other row.
    """

    files: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    to_read: int = 0
    problem: str | None = None

    def add(self, other: "Listed") -> None:
        """Count what another task has listed, too."""
        self.files += other.files
        self.rows += other.rows
        self.left_out += other.left_out
        self.to_read += other.to_read
        self.problem = self.problem or other.problem


def write_manifest(inputs: Sequence[Place], folder: Place, options: InventoryOptions | None = None) -> int:
    """List `inputs` into parquet files in `folder`, with one task for each source. Returns the number of rows.

    An object that two inputs hold is listed once. A list gives one row for each of its lines, even if lines repeat.
    Logs what was recognised, and what was left out and why. Raises InputError if an input holds nothing that may be an
    image, if it cannot be listed, or if `folder` lies inside it.
    """
    wanted = options or InventoryOptions()
    check_apart(inputs, folder)
    folder.make_folder()
    task = ray.remote(num_cpus=1)(write_source)
    total = Listed()
    waiting, number = sources(inputs, wanted, total.left_out), 0
    while waiting:
        try:
            done = ray.get([task.remote(source, at, folder, wanted) for at, source in enumerate(waiting, number)])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        number += len(waiting)
        waiting = [source for each in done for source in each.sources]
        for each in done:
            total.add(each)
    for name in folder.names():
        if name.startswith("part-") and name not in total.files:  # an interrupted listing found more
            (folder / name).delete()
    say(total.rows, total.left_out)
    if not total.to_read:
        held = ", ".join(place.uri for place in inputs)
        reason = (total.problem or "check the path, or the prefix and its bucket.").removeprefix("not_an_image: ")
        raise InputError(f"{held} hold no images: {reason}")
    return total.rows.total()


def write_source(source: Source, number: int, folder: Place, options: InventoryOptions) -> Listed:
    """List one source into `part-<number>-<k>.parquet` in `folder`."""
    listed = Listed()

    def rows() -> list[Row]:
        chunk: list[Row] = []
        while len(chunk) < _ROWS_PER_FILE and (found := next(stream, None)) is not None:
            if isinstance(found, Source):
                listed.sources.append(found)
            else:
                chunk.append(found)
        return chunk

    stream = rows_of(source, options, listed.left_out)
    while chunk := rows():
        listed.files.append(f"part-{number:05d}-{len(listed.files):05d}.parquet")
        (folder / listed.files[-1]).write_parquet(manifest_table(chunk), _ROWS_PER_GROUP)
        listed.rows.update(row["input_format"] for row in chunk)
        problems = [row["problem"] for row in chunk if row["problem"]]
        listed.to_read += len(chunk) - len(problems)
        listed.problem = listed.problem or next(iter(problems), None)
    return listed
