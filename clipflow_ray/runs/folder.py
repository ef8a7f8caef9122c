"""A resumable Ray Data run: one folder with a fingerprint, a manifest, and parts that are written exactly once.

run.json     the effective config, fingerprint and counts; written first, completed last
manifest/    one row per input object
<parts>/     parquet written by Ray Data, one file per finished block
resume/      ids of the rows in finished blocks (Ray Data's CheckpointConfig)
_SUCCESS     written after everything else
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pyarrow.dataset as pads
import ray
from pydantic import ValidationError
from ray.data import DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

from clipflow_ray.config import Closed
from clipflow_ray.errors import ClipflowError, RunConflictError
from clipflow_ray.place import Place
from clipflow_ray.runs.record import FinishedRecord, FinishedT, IdentityT, RunRecord

RUN: Final = "run.json"
SUCCESS: Final = "_SUCCESS"
MANIFEST: Final = "manifest"
_MAX_ROWS_PER_TASK: Final = 1024
_FILES_AT_ONCE: Final = 64
_MAX_BLOCK: Final = 16 * 2**20
_PENDING: Final = ".pending.parquet"  # Ray Data's note of a block that is being written; it is done again

RecordT = TypeVar("RecordT", bound=RunRecord[Any])


@dataclass(frozen=True)
class Run:
    """A run and the folder that holds it."""

    place: Place

    @property
    def finished(self) -> bool:
        """Whether `_SUCCESS` is there."""
        return (self.place / SUCCESS).exists()

    def completed(self, kind: type[FinishedT], identity: Closed | None = None) -> FinishedT | None:
        """The record of the finished run, or None if there is no finished run.

        Raises RunConflictError if the record is of another kind, or of another `identity` than the named one.
        """
        record = self._record(kind) if self.finished else None
        if record is not None and identity is not None:
            self._refuse_other(record.identity, identity)
        return record

    def begin(
        self, kind: type[RunRecord[IdentityT]], identity: IdentityT, make_manifest: Callable[[], int]
    ) -> RunRecord[IdentityT]:
        """Start the run, or take up one that was cut off, and return its record, which is of that `kind`.

        A new run lists its inputs once; a resumed one keeps that list. Raises RunConflictError, naming what
        differs, if the folder holds a run of another `identity`.
        """
        record = self._record(kind)
        if record is None:
            record = kind(identity=identity, manifest_rows=make_manifest())
            self._write(record)
        self._refuse_other(record.identity, identity)
        return record

    def succeed(self, record: FinishedRecord[Any]) -> None:
        """Write the completed record, then `_SUCCESS`, and nothing after that."""
        self._write(record)
        (self.place / SUCCESS).write("")

    def _record(self, kind: type[RecordT]) -> RecordT | None:
        place = self.place / RUN
        if not place.exists():
            return None
        try:
            return kind.model_validate_json(place.read_text())
        except ValidationError as error:
            first = error.errors()[0]
            raise RunConflictError(
                f"{place.uri} is not a record that this command reads "
                f"({'.'.join(map(str, first['loc'])) or 'json'}: {first['msg']}). Name another output, or use the "
                "command and the version that wrote it."
            ) from error

    def _write(self, record: RunRecord[Any]) -> None:
        (self.place / RUN).write(record.model_dump_json(indent=1) + "\n")

    def _refuse_other(self, old: Closed, new: Closed) -> None:
        differing = sorted(name for name in type(new).model_fields if getattr(old, name) != getattr(new, name))
        if differing:
            raise RunConflictError(
                f"{self.place.uri} holds a run with other {', '.join(differing)}. Name another output, or repeat "
                "the command that began it."
            )

    def files(self, name: str) -> list[str]:
        """The sorted names of the finished parquet files of one part."""
        return [
            file for file in (self.place / name).names() if file.endswith(".parquet") and not file.endswith(_PENDING)
        ]

    def table(self, name: str) -> pads.Dataset:
        """The finished parquet files of one part as a pyarrow dataset."""
        return (self.place / name).parquet(self.files(name))

    def parts(self, name: str) -> Iterator[pads.Dataset]:
        """The same files in their order, some at a time: a dataset keeps the footer of every file that it read."""
        files = self.files(name)
        for at in range(0, len(files), _FILES_AT_ONCE):
            yield (self.place / name).parquet(files[at : at + _FILES_AT_ONCE])

    def rows(self, name: str) -> int:
        """How many rows the finished files of one part hold."""
        return sum(int(part.count_rows()) for part in self.parts(name))

    def committed(self, name: str) -> int:
        """How many rows of one part a resumed run will not do again."""
        return self.rows(f"resume/{name}")

    def write(
        self, name: str, stages: Callable[[Dataset], Dataset], rows: int, rows_per_task: int | None = None
    ) -> None:
        """Write `stages(manifest)` as parquet under `name`; a repeated call writes only the rows that are missing.

        `rows_per_task` manifest rows are one unit of work and of resume. `stages` keeps `row_id` and one row per
        manifest row. Raises ClipflowError where rows out differ from rows in.
        """
        part = self.place / name
        part.make_folder()
        size = rows_per_task or max(8, min(_MAX_ROWS_PER_TASK, rows // 32))
        with self._resuming(name):  # a dataset keeps the context it was made in, so it is made in here
            stages(self._manifest(size)).write_parquet(
                **part.arguments("path", "filesystem"),
                min_rows_per_file=size,
                # A write is short. Where it has to wait for a CPU, readers and encoders take all until they are done,
                # and what was scored by then is lost with the run.
                ray_remote_args={"num_cpus": 0},
                concurrency=max(2, int(ray.cluster_resources().get("CPU", 0)) // 4),
            )
        written = self.rows(name)
        if written != rows:
            raise ClipflowError(f"{written} rows came out for {rows} objects in {part.uri}; keep it and report it.")

    def _manifest(self, rows_per_task: int) -> Dataset:
        """The manifest as a Ray dataset.

        Read from files and repartitioned right away: Ray Data's resume filters nothing on in-memory sources, and one
        small file would otherwise be one block.
        """
        manifest = ray.data.read_parquet(**(self.place / MANIFEST).arguments("paths", "filesystem"))
        return manifest.repartition(target_num_rows_per_block=rows_per_task)

    @contextmanager
    def _resuming(self, name: str) -> Iterator[None]:
        resume = self.place / "resume" / name
        resume.make_folder()
        context = DataContext.get_current()
        context.enable_progress_bars = sys.stderr.isatty()
        # Views pass from readers to encoders in blocks of this size, whatever the unit of work: a worker holds several.
        before, context.target_max_block_size = context.target_max_block_size, _MAX_BLOCK
        context.checkpoint_config = CheckpointConfig(
            id_column="row_id",
            **resume.arguments("checkpoint_path", "override_filesystem"),
            delete_checkpoint_on_success=False,
        )
        try:
            yield
        finally:
            context.checkpoint_config = None
            context.target_max_block_size = before
