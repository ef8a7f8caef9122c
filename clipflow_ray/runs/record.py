"""The fields of `run.json` that every run has. The record of a finished run adds fields of its own."""

from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, Field

from clipflow_ray.config import Closed, Record

IdentityT = TypeVar("IdentityT", bound=Closed)
FinishedT = TypeVar("FinishedT", bound="FinishedRecord[Any]")


class RunRecord(Record, Generic[IdentityT]):
    """The record of a run that has begun. Read from the file of a finished run, it has only the common fields."""

    model_config = ConfigDict(extra="ignore")

    identity: IdentityT = Field(
        description="Everything that determines the rows; the folder accepts no run of another identity."
    )
    manifest_rows: int = Field(description="Number of listed objects.")


class FinishedRecord(RunRecord[IdentityT], Generic[IdentityT]):
    """The record of a finished run."""

    model_config = ConfigDict(extra="forbid")
