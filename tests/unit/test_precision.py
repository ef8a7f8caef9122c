"""Which precision is chosen, and that scores, p-values and batches of bfloat16 are those of bfloat16 alone."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from clipflow_ray.cli import app
from clipflow_ray.config import TEST_TOWER, EncoderConfig, FlowConfig, PrecisionChoice, Segment
from clipflow_ray.doctor import checks
from clipflow_ray.errors import CalibrationError
from clipflow_ray.images import views
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Calibrated, Checkpoint, save_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.extractor import joined
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.precision import Bfloat16, at_precision, bfloat16_on
from tests.conftest import encoded, photo

TOWER = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
HALF = TOWER.model_copy(update={"precision": "bfloat16"})
SEGMENTS = (Segment(feature="block1.mean", size=224), Segment(feature="block2.cls", size=448))
AMX, PLAIN = Bfloat16(True, "a CPU with AMX"), Bfloat16(False, "a CPU without AMX")


def not_asked() -> Bfloat16:
    raise AssertionError("there is nothing to choose")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [photo(seed, (300 + seed, 320)) for seed in range(25)]


@pytest.fixture(scope="module")
def both(photographs: list[np.ndarray]) -> Checkpoint:
    """A checkpoint of the test tower that is calibrated for both precisions, each on the scores that it gives."""
    exact, rounded = Encoder(TOWER, SEGMENTS, "cpu"), Encoder(HALF, SEGMENTS, "cpu")
    packed = [views(image, exact.view) for image in photographs]
    natural = torch.from_numpy(joined(exact(packed), SEGMENTS))
    flow, generator = Flow((64, 64), FlowConfig(blocks=2, hidden=16)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        flow.fit_standardizer(natural)
        flow.fit_scale(natural)
        flow.eval()
        strata = ["jpeg|256-512"] * len(packed)
        calibrations = [
            Calibration.fit(flow(torch.from_numpy(joined(tower(packed), SEGMENTS))).score.numpy(), strata)
            for tower in (exact, rounded)
        ]
    return Checkpoint(
        encoder=TOWER,
        encoder_fingerprint=exact.fingerprint,
        view=exact.view,
        segments=SEGMENTS,
        widths=(64, 64),
        flow_config=FlowConfig(blocks=2, hidden=16),
        flow_state=flow.state_dict(),
        calibration=calibrations[0],
        further={"bfloat16": Calibrated(rounded.fingerprint, calibrations[1])},
    )


@pytest.fixture(scope="module")
def detectors(both: Checkpoint) -> dict[str, Detector]:
    return {precision: Detector(both, "cpu", precision=precision) for precision in both.precisions}


def test_auto_is_bfloat16_if_the_machine_is_fast_at_it_and_the_checkpoint_is_calibrated_for_it(
    both: Checkpoint,
) -> None:
    one = dataclasses.replace(both, further={})
    only_half = dataclasses.replace(both, calibration=None)
    cases: list[tuple[Checkpoint, PrecisionChoice, Bfloat16 | None, str, str]] = [
        (both, "auto", AMX, "bfloat16", "a CPU with AMX is faster at it"),
        (both, "auto", PLAIN, "float32", "a CPU without AMX is not faster at bfloat16"),
        (both.at("bfloat16"), "auto", PLAIN, "float32", "a CPU without AMX is not faster at bfloat16"),
        (one, "auto", None, "float32", "the checkpoint is calibrated for no other"),
        (only_half, "auto", None, "bfloat16", "the checkpoint is calibrated for no other"),
        (both, "float32", None, "float32", "it was asked for"),
        (both, "bfloat16", None, "bfloat16", "it was asked for"),
    ]
    for checkpoint, choice, device, precision, reason in cases:
        chosen, why = at_precision(checkpoint, choice, lambda device=device: device or not_asked())  # type: ignore[misc]
        assert (chosen.encoder.precision, why) == (precision, reason)
        assert chosen.calibration is not None and chosen.model_id == both.model_id
    with pytest.raises(CalibrationError, match="is calibrated for float32, not for bfloat16"):
        at_precision(one, "bfloat16", not_asked)


def test_amx_is_what_the_kernel_lists_and_a_limit_of_onednns_instructions_switches_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = " amx_bf16 " in Path("/proc/cpuinfo").read_text()
    found = bfloat16_on(torch.device("cpu"))
    assert found.fast == listed
    assert found.device == ("a CPU with AMX" if listed else "a CPU without AMX")
    for limit in ("AVX2", "avx512_core_bf16"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert bfloat16_on(torch.device("cpu")) == PLAIN
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert bfloat16_on(torch.device("cpu")).fast == listed


def test_each_p_value_is_the_rank_among_calibration_scores_of_its_own_precision(
    detectors: dict[str, Detector], both: Checkpoint, photographs: list[np.ndarray]
) -> None:
    data = [encoded(image, "PNG") for image in photographs]
    scores = {}
    for precision, detector in detectors.items():
        found = detector.detect(data, alpha=0.1)
        own = both.at(precision).calibration  # type: ignore[arg-type]
        assert own is not None and detector.calibration is own
        scores[precision] = np.array([finding.score for finding in found], np.float32)
        # The images are those of the calibration, so each score is in it, and its p-value counts the scores from it on.
        np.testing.assert_allclose(np.sort(scores[precision]), own.scores, atol=1e-4)
        ranks = [(1 + np.sum(own.scores >= score)) / (len(own.scores) + 1) for score in scores[precision]]
        assert [finding.p_value for finding in found] == pytest.approx(ranks)
    difference = np.abs(scores["bfloat16"] - scores["float32"])
    assert 1e-4 < difference.max() < 0.2 * scores["float32"].std()


def test_a_bfloat16_score_does_not_depend_on_batch_mates_or_on_threads(
    detectors: dict[str, Detector], both: Checkpoint, photographs: list[np.ndarray]
) -> None:
    packed = np.stack([views(image, both.view) for image in photographs])
    detector = detectors["bfloat16"]
    together, backwards = detector.score_views(packed).score, detector.score_views(packed[::-1]).score[::-1]
    alone = np.concatenate([detector.score_views(view[None]).score for view in packed])
    other = Detector(both, "cpu", threads=3, precision="bfloat16").score_views(packed[:7]).score
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(backwards, alone, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(other, alone[:7], rtol=1e-6, atol=1e-6)
    assert len(set(alone.tolist())) == len(alone)


def test_a_shared_encoder_decides_the_precision(detectors: dict[str, Detector], both: Checkpoint) -> None:
    for precision, detector in detectors.items():
        shared = Detector(both, "cpu", encoder=detector.encoder)
        assert shared.checkpoint.encoder.precision == precision
        assert shared.calibration is detector.calibration


def test_score_and_doctor_say_which_precision_is_used(
    both: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = str(tmp_path / "model"), tmp_path / "photo.png"
    save_checkpoint(both, model)
    image.write_bytes(encoded(photo(1), "PNG"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # the choice of an older processor
    line = {name: outcome for name, outcome, fine in checks(model) if fine}["precision"]
    if not torch.cuda.is_available():
        assert line.startswith("float32, because a CPU without AMX is not faster at bfloat16")
    arguments = ["score", str(image), "--checkpoint", model, "--alpha", "0.1"]
    for precision in ("float32", "bfloat16"):
        done = CliRunner().invoke(app, [*arguments, "--precision", precision])
        assert f"encoded in {precision}" in done.stderr.splitlines() and done.exit_code == 0
    wrong = CliRunner().invoke(app, [*arguments, "--precision", "float16"])
    assert wrong.exit_code == 2 and "'float16'" in wrong.stderr
