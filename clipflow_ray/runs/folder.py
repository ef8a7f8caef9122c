"""A resumable Ray Data run: one folder with a record, a manifest, and parts whose rows are written exactly once.

run.json     identity, settings and counts; written first, completed last
manifest/    one row per input object
<parts>/     parquet written by Ray Data, one file per finished block
resume/      ids of the rows in finished blocks (Ray Data's CheckpointConfig)
left/        the rows of the manifest that a resumed run has to process
_SUCCESS     written after everything else
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.dataset as pads
import ray
from pydantic import ValidationError
from ray.data import DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig, CheckpointManager

from clipflow_ray.compat import split_parquet_sink
from clipflow_ray.config import Closed
from clipflow_ray.errors import ClipflowError, RunConflictError
from clipflow_ray.place import Place
from clipflow_ray.runs.bounded import ahead
from clipflow_ray.runs.record import FinishedRecord, FinishedT, IdentityT, RunRecord
from clipflow_ray.runs.resume import write_left

RUN: Final = "run.json"
SUCCESS: Final = "_SUCCESS"
MANIFEST: Final = "manifest"
_MAX_ROWS_PER_TASK: Final = 1024
_FILES_AT_ONCE: Final = 64
_READERS: Final = 8
_MAX_BLOCK: Final = 16 * 2**20
_RESUME: Final = "resume"
# Ray Data's mark of an unfinished block, in `resume/`. It exists before the block's data file is opened, and is renamed
# when that file is whole. The name of the data file begins with that of the mark. A resumed run repeats the block.
_PENDING: Final = ".pending.parquet"

_LEFT: Final = "left"

RecordT = TypeVar("RecordT", bound=RunRecord[Any])


class _Unfiltered(CheckpointManager):
    """Ray Data marks finished blocks but filters no rows. It only gets rows that are left; see `Run.write`."""

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """No finished rows, so that Ray Data starts no filter."""
        return None, 0


@dataclass(frozen=True)
class Aside:
    """Columns that are written below a folder of their own. Each file there is named as that with the other columns.

    It also has `row_id`. Its rows may be in another order.
    """

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A run and the folder that holds it."""

    place: Place

    @property
    def finished(self) -> bool:
        """Whether `_SUCCESS` exists."""
        return (self.place / SUCCESS).exists()

    def begun(self, kind: type[RecordT]) -> RecordT | None:
        """The record of the run, finished or not, or None if there is none. Raises RunConflictError as `completed`."""
        return self._record(kind)

    def completed(self, kind: type[FinishedT], identity: Closed | None = None) -> FinishedT | None:
        """The record of the finished run, or None if there is no finished run.

        Raises RunConflictError if the record is of another kind, or if its identity is not the given `identity`.
        """
        record = self._record(kind) if self.finished else None
        if record is not None and identity is not None:
            self.refuse_other(record.identity, identity)
        return record

    def begin(
        self, kind: type[RunRecord[IdentityT]], identity: IdentityT, make_manifest: Callable[[], int]
    ) -> RunRecord[IdentityT]:
        """Start the run, or resume an interrupted one, and return its record, which is of class `kind`.

        A new run calls `make_manifest`, which lists the inputs and returns their number. A resumed run keeps its
        manifest. Raises RunConflictError, which names the differences, if the folder holds a run of another identity.
        """
        record = self._record(kind)
        if record is None:
            record = kind(identity=identity, manifest_rows=make_manifest())
            self._write(record)
        self.refuse_other(record.identity, identity)
        return record

    def succeed(self, record: FinishedRecord[Any]) -> None:
        """Write the completed record and then, as the last file of the run, `_SUCCESS`."""
        self._write(record)
        (self.place / SUCCESS).write("")

    def reopen(self) -> None:
        """Delete `_SUCCESS`, because results of the run are written again. `succeed` writes it again."""
        (self.place / SUCCESS).delete()

    def reopened(self, kind: type[FinishedT]) -> FinishedT | None:
        """The record of a run that was finished and was cut off after `reopen`; None of any other run."""
        try:
            return None if self.finished else self._record(kind)
        except RunConflictError:  # the record of a run that was never finished
            return None

    def _record(self, kind: type[RecordT]) -> RecordT | None:
        place = self.place / RUN
        if not place.exists():
            return None
        try:
            return kind.model_validate_json(place.read_text())
        except ValidationError as error:
            first = error.errors()[0]
            raise RunConflictError(
                f"{place.uri} is not a record that this command can read "
                f"({'.'.join(map(str, first['loc'])) or 'json'}: {first['msg']}). Name another output, or use the "
                "command and the version that wrote it."
            ) from error

    def _write(self, record: RunRecord[Any]) -> None:
        (self.place / RUN).write(record.model_dump_json(indent=1) + "\n")

    def refuse_other(self, old: Closed, new: Closed) -> None:
        """Raise RunConflictError, which names the differences, if the identities `old` and `new` differ."""
        differing = sorted(name for name in type(new).model_fields if getattr(old, name) != getattr(new, name))
        if differing:
            raise RunConflictError(
                f"{self.place.uri} holds a run with other {', '.join(differing)}. Name another output, or repeat "
                "the command that started the run."
            )

    def files(self, name: str) -> list[str]:
        """The sorted names of the finished parquet files of one part. Another process may be writing others."""
        found = [
            file for file in (self.place / name).names() if file.endswith(".parquet") and not file.endswith(_PENDING)
        ]
        # The marks are listed after the files: a file whose mark is gone by now is whole.
        marks = (self.place / _RESUME / name).names()
        unfinished = tuple(mark.removesuffix(_PENDING) for mark in marks if mark.endswith(_PENDING))
        return [file for file in found if not file.startswith(unfinished)]

    def table(self, name: str) -> pads.Dataset:
        """The finished parquet files of one part as a pyarrow dataset."""
        return (self.place / name).parquet(self.files(name))

    def tables(self, name: str, files: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The tables in these files of one part, or only their `columns`, in the order of `files`; read ahead."""
        folder = self.place / name
        return ahead(lambda file: (folder / file).read_parquet(columns), files, _READERS, 2 * _READERS)

    def parts(self, name: str) -> Iterator[pads.Dataset]:
        """The finished parquet files of one part, in their order, as datasets of at most 64 files.

        A dataset keeps the footer of every file that it read, so one dataset of all files would take too much memory.
        """
        files = self.files(name)
        for at in range(0, len(files), _FILES_AT_ONCE):
            yield (self.place / name).parquet(files[at : at + _FILES_AT_ONCE])

    def rows(self, name: str) -> int:
        """Number of rows in the finished files of one part."""
        return sum(int(part.count_rows()) for part in self.parts(name))

    def committed(self, name: str) -> int:
        """Number of rows of one part that a resumed run skips, because they are finished."""
        return self.rows(f"{_RESUME}/{name}")

    def write(
        self,
        name: str,
        stages: Callable[[Dataset], Dataset],
        rows: int,
        rows_per_task: int | None = None,
        aside: Aside | None = None,
    ) -> None:
        """Write `stages(manifest)` as parquet under `name`; a repeated call writes only the rows that are missing.

        A task processes `rows_per_task` manifest rows, and a resumed run repeats unfinished tasks. `stages` must keep
        `row_id` and return one row per manifest row. Raises ClipflowError if the part does not end with `rows` rows.
        """
        part = self.place / name
        part.make_folder()
        self._delete_unfinished(name)
        left = self._left(name, rows)
        size = rows_per_task or max(8, min(_MAX_ROWS_PER_TASK, rows // 32))
        options: dict[str, Any] = {
            # A write takes no CPU slot. If it needed one, it would wait until all readers and encoders are done, and a
            # run that is interrupted before that would lose all its scores.
            "ray_remote_args": {"num_cpus": 0},
            "concurrency": max(2, int(ray.cluster_resources().get("CPU", 0)) // 4),
        }
        place = part.arguments("path", "filesystem")
        if left:
            with self._resuming(name):  # a dataset keeps the DataContext in which it was made
                dataset = stages(self._listed(left, size))
                if aside is None:
                    dataset.write_parquet(**place, min_rows_per_file=size, **options)
                else:
                    beside = (self.place / aside.name).arguments("path", "filesystem")
                    dataset.write_datasink(split_parquet_sink(place, beside, aside.columns, size), **options)
        if aside is not None:
            self._delete_torn(name, aside.name)
        written = self.rows(name)
        if written != rows:
            raise ClipflowError(
                f"{part.uri} has {written} rows for {rows} objects. Keep the folder and report this error."
            )

    def _delete_unfinished(self, name: str) -> None:
        """Delete the files of a part that an interrupted write has left unfinished, and then their marks."""
        marks = [mark for mark in (self.place / _RESUME / name).names() if mark.endswith(_PENDING)]
        unfinished = tuple(mark.removesuffix(_PENDING) for mark in marks)
        for file in (self.place / name).names() if marks else ():
            if file.startswith(unfinished):
                (self.place / name / file).delete()
        for mark in marks:
            (self.place / _RESUME / name / mark).delete()

    def _delete_torn(self, name: str, aside: str) -> None:
        """Delete the files aside that an interrupted write has left: those without a file of the same name."""
        for orphan in set(self.files(aside)) - set(self.files(name)):
            (self.place / aside / orphan).delete()

    def _left(self, name: str, rows: int) -> str | None:
        """The folder with the manifest rows that one part lacks; None if it lacks none."""
        finished = self.files(f"{_RESUME}/{name}")
        if not finished:
            return MANIFEST
        left = f"{_LEFT}/{name}"
        for old in self.files(left):
            (self.place / left / old).delete()
        ids = self.tables(f"{_RESUME}/{name}", finished, ["row_id"])
        count = write_left(self.place / MANIFEST, self.files(MANIFEST), rows, ids, self.place / left)
        return left if count else None

    def _listed(self, folder: str, rows_per_task: int) -> Dataset:
        """Rows of the manifest as a Ray dataset.

        They are read from files, because Ray Data writes no marks for an in-memory source. They are repartitioned at
        once, because one small file would otherwise be one block.
        """
        manifest = ray.data.read_parquet(**(self.place / folder).arguments("paths", "filesystem"))
        return manifest.repartition(target_num_rows_per_block=rows_per_task)

    @contextmanager
    def _resuming(self, name: str) -> Iterator[None]:
        resume = self.place / _RESUME / name
        resume.make_folder()
        context = DataContext.get_current()
        context.enable_progress_bars = sys.stderr.isatty()
        # Views pass from readers to encoders in blocks of at most this size. It does not depend on `rows_per_task`,
        # because a worker holds several blocks in memory.
        before, context.target_max_block_size = context.target_max_block_size, _MAX_BLOCK
        context.checkpoint_config = CheckpointConfig(
            id_column="row_id",
            **resume.arguments("checkpoint_path", "override_filesystem"),
            delete_checkpoint_on_success=False,
            checkpoint_manager_cls=_Unfiltered,
        )
        try:
            yield
        finally:
            context.checkpoint_config = None
            context.target_max_block_size = before
