"""What `run.json` holds: the facts that every run records. A finished run's record adds facts of its own."""

from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, Field

from clipflow_ray.config import Closed, Record

IdentityT = TypeVar("IdentityT", bound=Closed)
FinishedT = TypeVar("FinishedT", bound="FinishedRecord[Any]")


class RunRecord(Record, Generic[IdentityT]):
    """The record of a run that has begun. Read from a finished run's file, it leaves out what that run added."""

    model_config = ConfigDict(extra="ignore")

    identity: IdentityT = Field(description="All that shapes the rows; the folder takes no run of another identity.")
    manifest_rows: int = Field(description="Number of listed objects.")


class FinishedRecord(RunRecord[IdentityT], Generic[IdentityT]):
    """The record of a finished run."""

    model_config = ConfigDict(extra="forbid")
