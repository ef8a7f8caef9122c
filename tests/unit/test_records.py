"""The json files of a run: what is written comes back, what is unknown is refused, what is older is read."""

import json
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import clipflow_ray.audit.record
import clipflow_ray.evaluate.record
import clipflow_ray.lab.benchmark.audit
import clipflow_ray.lab.benchmark.common
import clipflow_ray.lab.benchmark.listing
import clipflow_ray.lab.benchmark.pipeline
import clipflow_ray.lab.benchmark.proxies
import clipflow_ray.lab.benchmark.rescore
import clipflow_ray.lab.benchmark.sandbox
import clipflow_ray.lab.benchmark.serve
import clipflow_ray.lab.benchmark.towers
import clipflow_ray.lab.record
import clipflow_ray.model.calibration
import clipflow_ray.model.record
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
from clipflow_ray.config import (
    OPENAI_VIEW,
    AuditConfig,
    Closed,
    Config,
    EncoderConfig,
    FlowConfig,
    ImageLimits,
    InventoryOptions,
    ObjectiveConfig,
    ProxyConfig,
    Record,
    Segment,
    TrainingLimits,
)
from clipflow_ray.evaluate.record import (
    CellFigures,
    ClassCounts,
    Comparison,
    DetectorFigures,
    DistortionsIdentity,
    DistortionsRecord,
    EvaluationFigures,
    Rate,
    RateTogether,
    RobustnessPoint,
    SourceRate,
    Spread,
    ThresholdFigures,
    Uniformity,
    VariantFigures,
    VariantsIdentity,
    VariantsRecord,
)
from clipflow_ray.model.calibration import SourceRange
from clipflow_ray.model.record import CalibratedRecord, CheckpointRecord
from clipflow_ray.statistics import flagged_rate
from clipflow_ray.train.parts import Parts
from clipflow_ray.train.record import FeaturesIdentity, FeaturesRecord
from tests.unit.test_checkpoint import TRAINING

MODULES = (
    clipflow_ray.audit.record,
    clipflow_ray.evaluate.record,
    clipflow_ray.lab.benchmark.audit,
    clipflow_ray.lab.benchmark.common,
    clipflow_ray.lab.benchmark.listing,
    clipflow_ray.lab.benchmark.pipeline,
    clipflow_ray.lab.benchmark.proxies,
    clipflow_ray.lab.benchmark.rescore,
    clipflow_ray.lab.benchmark.sandbox,
    clipflow_ray.lab.benchmark.serve,
    clipflow_ray.lab.benchmark.towers,
    clipflow_ray.lab.record,
    clipflow_ray.model.calibration,
    clipflow_ray.model.record,
    clipflow_ray.runs.record,
    clipflow_ray.statistics,
    clipflow_ray.train.record,
)
TIMING = Timing(seconds=2.5, objects=10, objects_per_second=4.0)
RATE = flagged_rate(2, 9, 0.1)
SEGMENTS = (
    Segment(feature="block1.cls", size=448, training="paired"),
    Segment(feature="block2.mean", size=224),
)
ENCODED: dict[str, Any] = {"encoder_fingerprint": "e" * 16, "segments": SEGMENTS[1:]}


UNSEEN = SourceRange(sources=9, median=0.1, mean=0.125, low=0.0, high=0.25)
CARD = CalibrationCard(
    calibration_n=99,
    calibration_sources=9,
    threshold=1.25,
    p_floor=0.01,
    false_positive_rate_95=(0.05, 0.17),
    unseen_source=UNSEEN,
    prone_strata=("png|0-256",),
    in_words=("p cannot be below 0.01.",),
)


def audit_record() -> AuditRecord:
    return AuditRecord(
        identity=AuditIdentity(
            input=("s3://bucket/ünï/",),
            encoder_fingerprint="e" * 16,
            precision="bfloat16",
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
        calibration=CARD,
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
            precision="bfloat16",
            sample=1.0,
            dedupe="none",
        ),
        command="clipflow-ray audit",
        calibration=CARD,
        capped=1,
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
        drift=Drift(ks_distance=0.1, p_value=0.5, median=1.5, calibration_median=1.25, unlike=False),
    )


def features_record() -> FeaturesRecord:
    return FeaturesRecord(
        identity=FeaturesIdentity(
            input=("/in",),
            inventory=InventoryOptions(uri_column="path"),
            listing="l" * 16,
            encoder_fingerprint="e" * 16,
            proxies=ProxyConfig(pairs=0.25),
            parts=Parts(by="source", validation=("lake",), calibration=("harbour",)),
            limits=TrainingLimits(),
            tool_version="0.1.0",
            segments=SEGMENTS,
        ),
        manifest_rows=7,
        errors=2,
    )


def variants_record() -> VariantsRecord:
    identity = VariantsIdentity(
        natural=("/natural",),
        generated=("/generated",),
        inventory=InventoryOptions(uri_column="path"),
        listing="l" * 16,
        variants=("a", "b"),
        **ENCODED,
    )
    return VariantsRecord(identity=identity, manifest_rows=7)


def distortions_record() -> DistortionsRecord:
    identity = DistortionsIdentity(listing="l" * 16, cases=("jpeg 95",), draws={"r0": 0, "r1": 0}, **ENCODED)
    return DistortionsRecord(identity=identity, manifest_rows=2)


def evaluation_figures() -> EvaluationFigures:
    n, rate = ClassCounts(natural=30, generated=20), Rate(flagged=1, of=20, rate=0.05, wilson_95=(0.01, 0.2))
    headline = DetectorFigures(
        auroc=0.75,
        auroc_95=(0.5, 0.9),
        average_precision=0.7,
        oracle_tpr={"0.01": 0.25},
        macro_auroc=0.75,
        worst_quartile_auroc=0.7,
        per_generator_auroc={"low_pass": 0.75},
    )
    threshold = ThresholdFigures(
        threshold=1.25,
        tpr=rate,
        fpr=rate,
        balanced_accuracy=0.5,
        false_positive_rate_95=(0.0, 0.1),
        unseen_source=UNSEEN,
        prone_strata=("png|0-256",),
        capped=n,
        audited_together=RateTogether(**dict(RATE), generated_share=0.4),
        per_generator={"low_pass": rate},
        per_source={"lake": SourceRate(**dict(rate), expected_95=(0.0, 0.2), inside=True, excess_lower_bound=0.0)},
    )
    variant = VariantFigures(
        n=n,
        detectors={"flow": headline},
        metadata_only=headline,
        comparisons={
            "knn": Comparison(auroc_difference=0.1, difference_95=(-0.1, 0.3), outcome="no difference beyond the noise")
        },
        auroc_by_seed=(0.75, 0.5),
        by_seed=({"auroc": 0.75}, {"auroc": 0.5}),
        over_seeds={"auroc": Spread(mean=0.625, std=0.1, min=0.5, max=0.75)},
        thresholds={"0.05": threshold},
        p_uniformity_on_naturals=Uniformity(ks_distance=0.1, p=0.5),
        p_values_of_naturals=(10, 20),
    )
    return EvaluationFigures(
        disclaimer="not proof",
        model_id="m" * 16,
        calibration_id="c" * 16,
        seed_model_ids=("n" * 16,),
        natural=("/natural",),
        generated=("/generated",),
        auroc=0.75,
        n=n,
        calibration_n=99,
        calibration_sources=9,
        calibration_in_words=("p cannot be below 0.01.",),
        variants={"as_found": variant},
        by_format={"JPEG": CellFigures(n=n, auroc=0.75, auroc_95=(0.5, 0.9), tpr={"0.05": rate}, fpr={"0.05": rate})},
        by_size={"below 512 pixels": CellFigures(n=n, auroc=None, auroc_95=None, tpr={}, fpr={"0.05": rate})},
        metadata_only_auroc=0.75,
        format_gap_auroc={"flow": 0.0},
        unreadable=1,
        unreadable_by_code={"truncated": 1},
        robustness=(
            RobustnessPoint(distortion="jpeg", level=95.0, n=n, auroc=0.5, tpr={"0.05": rate}, fpr={"0.05": rate}),
        ),
    )


def checkpoint_record() -> CheckpointRecord:
    return CheckpointRecord(
        model_id="m" * 16,
        encoder=EncoderConfig(view="crop"),
        encoder_fingerprint="e" * 16,
        view=OPENAI_VIEW.model_copy(update={"sizes": (448, 224)}),
        segments=SEGMENTS,
        widths=(6, 4),
        flow=FlowConfig(blocks=2),
        limits=ImageLimits(min_side=16),
        objective=ObjectiveConfig(kind="both"),
        proxies=ProxyConfig(pairs=0.25),
        calibration_strata=("jpeg|0-256", "ünï|x"),
        further={"bfloat16": CalibratedRecord(encoder_fingerprint="f" * 16, calibration_strata=("png|0-256",))},
        training=TRAINING,
        sha256={"flow.safetensors": "0" * 64},
        record_sha256="1" * 64,
    )


RECORDS = [
    audit_record(),
    audit_report(),
    features_record(),
    variants_record(),
    distortions_record(),
    evaluation_figures(),
    checkpoint_record(),
]
VERSIONS: dict[type, int] = {CheckpointRecord: 4}
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)


@each_record
def test_what_is_written_comes_back(record: Record) -> None:
    assert type(record).model_validate_json(record.model_dump_json(indent=1)) == record
    assert json.loads(record.model_dump_json())["format_version"] == VERSIONS.get(type(record), 1)


@each_record
def test_an_unknown_key_is_refused_wherever_it_is(record: Record) -> None:
    for path in objects(record):
        plain = record.model_dump(mode="json")
        inner: Any = plain
        for key in path:
            inner = inner[key]
        inner["something"] = 1
        with pytest.raises(ValidationError, match="something"):
            type(record).model_validate_json(json.dumps(plain))


def objects(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of the models in a record, its own first."""
    inner: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, BaseModel):
        yield path
        inner = value
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, tuple):
        inner = enumerate(value)
    for key, each in inner:
        yield from objects(each, (*path, key))


@each_record
def test_a_file_older_than_the_format_version_is_read_and_one_of_another_version_refused(record: Record) -> None:
    plain = record.model_dump(mode="json")
    del plain["format_version"]
    assert type(record).model_validate_json(json.dumps(plain)) == record
    with pytest.raises(ValidationError, match="format_version"):
        type(record).model_validate_json(json.dumps(plain | {"format_version": VERSIONS.get(type(record), 1) + 1}))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_field_is_described_in_a_sentence(module: ModuleType) -> None:
    models = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    described = [model for model in models if issubclass(model, Closed) and not issubclass(model, Config)]
    assert described
    for model in described:
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), f"{model.__name__}.{name}"
