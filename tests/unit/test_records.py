"""The json files of a run: what is written comes back, what is unknown is refused, what is older is read."""

import json
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import clipflow_ray.audit.record
import clipflow_ray.evaluate.record
import clipflow_ray.runs.record
import clipflow_ray.statistics
import clipflow_ray.train.record
from clipflow_ray.audit.record import (
    AuditIdentity,
    AuditRecord,
    AuditReport,
    CalibrationCard,
    Counts,
    Drift,
    ErrorExample,
    ErrorGroup,
    NamedRate,
    ReportCard,
    ScoreHistogram,
    Timing,
)
from clipflow_ray.config import AuditConfig, Closed, Config, ImageLimits, InventoryOptions, ProxyConfig, Record
from clipflow_ray.evaluate.record import (
    DistortionsIdentity,
    DistortionsRecord,
    VariantsIdentity,
    VariantsRecord,
)
from clipflow_ray.statistics import flagged_rate
from clipflow_ray.train.record import FeaturesIdentity, FeaturesRecord

MODULES = (
    clipflow_ray.audit.record,
    clipflow_ray.evaluate.record,
    clipflow_ray.runs.record,
    clipflow_ray.statistics,
    clipflow_ray.train.record,
)
TIMING = Timing(seconds=2.5, objects=10, objects_per_second=4.0)
RATE = flagged_rate(2, 9, 0.1)
ENCODED = {"encoder_fingerprint": "e" * 16, "features": ("projected",)}


def audit_record() -> AuditRecord:
    return AuditRecord(
        identity=AuditIdentity(
            input=("s3://bucket/ünï/",),
            encoder_fingerprint="e" * 16,
            inventory=InventoryOptions(group_by="prefix:2"),
            limits=ImageLimits(min_side=16),
            sample=0.5,
            model_id="m" * 16,
            calibration_id="c" * 16,
            tool_version="0.1.0",
        ),
        manifest_rows=10,
        config=AuditConfig(input=("s3://bucket/ünï/",), output="/out", gallery=3),
        timing=TIMING,
        alpha=0.1,
        dedupe="sha256",
        calibration=CalibrationCard(calibration_n=99, threshold=1.25, false_positive_rate_95=(0.05, 0.17)),
        ledger="/out/ledger",
        report="/out/report.html",
        rows=10,
        by_status={"error": 1, "ok": 9},
        by_error_code={"truncated": 1},
        by_verdict={"likely_ai": 2, "no_ai_signal": 7},
        flagged=RATE,
    )


def audit_report() -> AuditReport:
    row = NamedRate(name="lake", q=0.25, marked=False, **dict(RATE))
    return AuditReport(
        disclaimer="not proof",
        card=ReportCard(
            input=("/in",),
            checkpoint="m" * 16,
            calibration="c" * 16,
            calibration_n=99,
            alpha=0.1,
            false_positive_rate_95=(0.05, 0.17),
            tool_version="0.1.0",
            encoder="e" * 16,
            sample=1.0,
            dedupe="none",
        ),
        command="clipflow-ray audit",
        counts=Counts(status={"ok": 9}, verdict={"likely_ai": 2}, error_code={"truncated": 1}, rows=10),
        timing=TIMING,
        flagged=RATE,
        groups=(row,),
        strata=(row, row),
        errors={
            "truncated": ErrorGroup(count=1, examples=(ErrorExample(place="/in/a.jpg", message="It ends early."),))
        },
        scores=ScoreHistogram(edges=(0.0, 1.0, 2.0), audit=(0.5, 0.5), calibration=(0.25, 0.75)),
        p_values=(4, 5),
        drift=Drift(ks_distance=0.1, p_value=0.5, median=1.5, calibration_median=1.25),
    )


def features_record() -> FeaturesRecord:
    return FeaturesRecord(
        identity=FeaturesIdentity(
            input=("/in",),
            listing="l" * 16,
            encoder_fingerprint="e" * 16,
            proxies=ProxyConfig(pairs=0.25),
            calibration=("harbour",),
            limits=ImageLimits(),
            tool_version="0.1.0",
            features=("projected", "block1.cls"),
        ),
        manifest_rows=7,
        errors=2,
    )


def variants_record() -> VariantsRecord:
    identity = VariantsIdentity(input=("/natural", "/generated"), listing="l" * 16, variants=("a", "b"), **ENCODED)
    return VariantsRecord(identity=identity, manifest_rows=7)


def distortions_record() -> DistortionsRecord:
    identity = DistortionsIdentity(listing="l" * 16, cases=("jpeg 95",), draws={"r0": 0, "r1": 0}, **ENCODED)
    return DistortionsRecord(identity=identity, manifest_rows=2)


RECORDS = [audit_record(), audit_report(), features_record(), variants_record(), distortions_record()]
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)


@each_record
def test_what_is_written_comes_back(record: Record) -> None:
    assert type(record).model_validate_json(record.model_dump_json(indent=1)) == record
    assert json.loads(record.model_dump_json())["format_version"] == 1


@each_record
def test_an_unknown_key_is_refused_wherever_it_is(record: Record) -> None:
    for at in places(record.model_dump(mode="json")):
        plain = record.model_dump(mode="json")
        inner: Any = plain
        for key in at:
            inner = inner[key]
        inner["something"] = 1
        with pytest.raises(ValidationError, match="something"):
            type(record).model_validate_json(json.dumps(plain))


def places(plain: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where objects with fixed keys lie in a record: `[()]` and the paths of those below."""
    inner = [
        found
        for key, value in plain.items()
        if isinstance(value, dict) and key not in OPEN
        for found in places(value, (*at, key))
    ]
    return [at, *inner]


# Their keys are names of what was found, not names of fields.
OPEN = {"by_status", "by_error_code", "by_verdict", "status", "verdict", "error_code", "errors", "draws", "families"}


@each_record
def test_a_file_older_than_the_format_version_is_read_and_one_of_another_version_refused(record: Record) -> None:
    plain = record.model_dump(mode="json")
    del plain["format_version"]
    assert type(record).model_validate_json(json.dumps(plain)) == record
    with pytest.raises(ValidationError, match="format_version"):
        type(record).model_validate_json(json.dumps(plain | {"format_version": 2}))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_field_is_described_in_a_sentence(module: ModuleType) -> None:
    models = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    described = [model for model in models if issubclass(model, Closed) and not issubclass(model, Config)]
    assert described
    for model in described:
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), f"{model.__name__}.{name}"
