"""The scoring path end to end on the test tower, compared with scores that this file computes independently."""

import array
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from clipflow_ray import load_detector
from clipflow_ray.config import TEST_TOWER, EncoderConfig, FlowConfig, ImageLimits, Segment
from clipflow_ray.errors import CalibrationError, CheckpointError, EncoderMismatchError
from clipflow_ray.images import by_size, views
from clipflow_ray.model.calibration import VERDICTS, Calibration
from clipflow_ray.model.checkpoint import Checkpoint, save_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import Encoder, resolved, widths_of
from clipflow_ray.model.extractor import joined
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.weights import build_tower, load_record, load_weights

TOWER = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
CALIBRATION_SIZE = 199
PROJECTED = (Segment(feature="projected", size=224),)


def picture(seed: int, width: int = 224, height: int = 224) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 3 + seed % 5, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def reference_scores(flow: Flow, images: list[Image.Image]) -> np.ndarray:
    """Scores of 224 x 224 images by torchvision's pixels, open_clip's tower, a float64 flow and the normal density."""
    weights = load_weights(TOWER)
    tower = build_tower(weights.architecture).eval()
    tower.load_state_dict(weights.state)
    pixels = torch.stack([normalize(to_tensor(i), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) for i in images])
    exact = Flow((32,), FlowConfig(blocks=3, hidden=16)).double()
    exact.load_state_dict(flow.state_dict())
    with torch.inference_mode():
        z, log_det = exact.transform(exact.standardize(tower(pixels).double()))
        log_density = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1) + log_det[:, 0]
    scores: np.ndarray = (-log_density / 32).numpy()
    return scores


@pytest.fixture(scope="module")
def flow() -> Flow:
    flow = Flow((32,), FlowConfig(blocks=3, hidden=16))
    generator = torch.Generator().manual_seed(0)
    packed = np.stack([np.array(picture(seed)).ravel() for seed in range(100, 140)])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        flow.fit_standardizer(torch.from_numpy(Encoder(TOWER, PROJECTED, "cpu")(packed)["projected@224"]))
    return flow.eval()


@pytest.fixture(scope="module")
def checkpoint(flow: Flow) -> Checkpoint:
    typical = reference_scores(flow, [picture(seed) for seed in range(200, 220)])
    spread = np.random.default_rng(0).normal(typical.mean(), typical.std(), CALIBRATION_SIZE).astype(np.float32)
    return Checkpoint(
        encoder=TOWER,
        encoder_fingerprint=Encoder(TOWER, PROJECTED, "cpu").fingerprint,
        view=load_record(TOWER).view,
        segments=PROJECTED,
        widths=(32,),
        flow_config=FlowConfig(blocks=3, hidden=16),
        flow_state=flow.state_dict(),
        calibration=Calibration.fit(spread, ["png|0-256"] * CALIBRATION_SIZE),
    )


@pytest.fixture(scope="module")
def detector(checkpoint: Checkpoint) -> Detector:
    return Detector(checkpoint, device="cpu", limits=ImageLimits(max_bytes=2_000_000))


def test_the_score_is_the_negative_log_likelihood_per_dimension_of_the_pixels(detector: Detector, flow: Flow) -> None:
    images = [picture(seed) for seed in range(8)]
    found = detector.detect([encoded(image) for image in images])
    expected = reference_scores(flow, images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.array([f.score for f in found], float), expected, atol=1e-4)
    np.testing.assert_allclose(np.array([f.log_likelihood for f in found], float), -32 * expected, atol=32e-4)


def test_the_p_value_and_the_verdict_follow_from_the_score(detector: Detector, checkpoint: Checkpoint) -> None:
    assert checkpoint.calibration is not None
    alpha, found = 0.1, detector.detect([encoded(picture(seed)) for seed in range(40)], alpha=0.1)
    for finding in found:
        assert finding.score is not None
        p = (1 + sum(float(s) >= finding.score for s in checkpoint.calibration.scores)) / (CALIBRATION_SIZE + 1)
        assert finding.p_value == pytest.approx(p, abs=1e-6)
        expected = "likely_ai" if p <= alpha else "inconclusive" if p <= 5 * alpha else "no_ai_signal"
        assert finding.verdict == expected
    assert {finding.verdict for finding in found} == set(VERDICTS)


def test_a_score_does_not_depend_on_batch_mates_or_on_how_many_there_are(detector: Detector) -> None:
    # More than one inner batch, of mixed formats and sizes.
    data = [encoded(picture(s, 40 + 9 * s, 300 - 5 * s), ("PNG", "JPEG", "WEBP")[s % 3]) for s in range(35)]
    together = detector.detect(data)
    backwards = detector.detect(data[::-1])[::-1]
    alone = [detector.detect(item) for item in data]
    for name in ("score", "log_likelihood", "p_value"):
        # Near the naturals a score is about 1. Far from them scores reach 1,000 here.
        atol = 32e-5 if name == "log_likelihood" else 1e-5
        expected = [getattr(f, name) for f in alone]
        np.testing.assert_allclose([getattr(f, name) for f in together], expected, rtol=1e-6, atol=atol)
        np.testing.assert_allclose([getattr(f, name) for f in backwards], expected, rtol=1e-6, atol=atol)
    assert [f.index for f in together] == list(range(35))
    assert [f.sha256 for f in together] == [f.sha256 for f in alone]
    assert len({f.score for f in alone}) == 35


def test_scores_and_embeddings_do_not_depend_on_batch_mates_on_an_older_processor() -> None:
    """Kernels depend on the instruction set, so the same tests run in a process that is restricted to AVX2."""
    tests = [
        f"{__file__}::{test_a_score_does_not_depend_on_batch_mates_or_on_how_many_there_are.__name__}",
        f"{Path(__file__).with_name('test_encoder.py')}::test_an_embedding_does_not_depend_on_its_batch_mates",
    ]
    switches = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=os.environ | switches, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-3000:]


def test_each_kind_of_picture_gets_the_finding_of_its_bytes(detector: Detector, tmp_path: Path) -> None:
    image = picture(1, 300, 200)
    data, path = encoded(image, "JPEG"), tmp_path / "a.jpg"
    path.write_bytes(data)
    found = detector.detect(data)
    assert found.status == "ok"
    for held in (path, str(path), bytearray(data), memoryview(data), io.BytesIO(data)):
        assert detector.detect(held) == found
    with path.open("rb") as file:
        assert detector.detect([file]) == [found]
    png = detector.detect(encoded(image))
    for pixels in (image, np.asarray(image), np.asarray(image)[::-1].copy()[::-1], image.convert("RGBA")):
        finding = detector.detect(pixels)
        assert (finding.format, finding.stratum, finding.warnings) == ("PNG", png.stratum, png.warnings)
        np.testing.assert_allclose(finding.score, png.score, rtol=1e-6)  # type: ignore[arg-type]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif)))
    np.testing.assert_allclose(detector.detect(turned).score, png.score, rtol=1e-6)  # type: ignore[arg-type]
    embeddings = detector.embed([path, image])
    assert np.isfinite(embeddings.values).all() and not embeddings.errors


def test_a_file_that_cannot_be_read_is_an_error_at_its_own_position(detector: Detector, tmp_path: Path) -> None:
    cut = Image.open(io.BytesIO(encoded(picture(1, 300, 200), "JPEG")[:900]))
    (tmp_path / "large.jpg").write_bytes(bytes(2000))
    small = Detector(detector.checkpoint, "cpu", encoder=detector.encoder, limits=ImageLimits(max_bytes=1999))
    held: list[Any] = [
        tmp_path / "gone.jpg",
        tmp_path,
        "a\0b",
        "https://example.org/a.jpg",
        cut,
        tmp_path / "large.jpg",
    ]
    found = small.detect(held)
    codes = [finding.error and finding.error["code"] for finding in found]
    assert codes == ["not_found", "read_failed", "read_failed", "bad_uri", "decode_failed", "too_large_bytes"]
    assert [finding.index for finding in found] == list(range(6))


def test_a_folder_gives_a_finding_for_each_file_that_is_or_claims_to_be_an_image(
    detector: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a", "sub/c.txt"):
        (tmp_path / name).write_bytes(encoded(picture(1)))
    (tmp_path / "bad.jpg").write_text("no image")
    (tmp_path / "caption.txt").write_text("a caption")
    (tmp_path / "README.md").write_text("# card")
    found = detector.detect_folder(tmp_path, alpha=0.1)
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["b.png", "bad.jpg", "sub/a", "sub/c.txt"]
    assert [finding.status for finding in found.values()] == ["ok", "error", "ok", "ok"]
    assert "2 files" in caplog.text and "no images" in caplog.text
    with pytest.raises(NotADirectoryError):
        detector.detect_folder(tmp_path / "b.png")


class OddBytes(bytes):
    """Bytes that lie about their length."""

    def __len__(self) -> int:
        return 3


WRONG = st.one_of(
    *(st.none(), st.integers(), st.floats(), st.booleans(), st.complex_numbers(), st.dates(), st.just(object())),
    st.builds(array.array, st.just("i"), st.lists(st.integers(0, 9))),
    st.builds(np.zeros, st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["u1", "f4", "O"])),
    st.builds(io.StringIO, st.text()),
    st.sets(st.integers()),
    st.dictionaries(st.text(), st.binary()),
    st.builds(lambda text: iter([text]), st.binary()),
    st.builds(OddBytes, st.binary(max_size=40)),
    st.builds(Image.new, st.just("F"), st.just((40, 40))),
    st.just(bytes),
    st.just(Path),
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(WRONG, st.lists(st.one_of(WRONG, st.binary(max_size=40), st.text()), max_size=4)))
def test_whatever_is_given_the_next_call_is_not_affected(detector: Detector, given: Any) -> None:
    expected = _EXPECTED.setdefault("finding", detector.detect(_GOOD))
    for call in (detector.detect, detector.embed):
        with suppress(TypeError):
            call(given)
    assert detector.detect(_GOOD) == expected


_GOOD = encoded(picture(3, 64, 64))
_EXPECTED: dict[str, Any] = {}


def test_bad_bytes_among_good_ones_are_errors_at_their_own_position(detector: Detector) -> None:
    jpeg = encoded(picture(1, 300, 200), "JPEG")
    data = [
        b"",
        jpeg,
        b"plain text",
        jpeg[: len(jpeg) // 2],
        encoded(picture(2, 20, 400)),
        encoded(picture(2)),
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        jpeg + b"\0" * 2_000_000,
    ]
    found = detector.detect(data)
    codes = [None if f.error is None else f.error["code"] for f in found]
    assert codes[:6] == ["empty", None, "unsupported_format", "truncated", "too_small", None]
    assert codes[6] in ("truncated", "decode_failed") and codes[7] == "too_large_bytes"
    assert [f.index for f in found] == list(range(8))
    assert [f.status for f in found] == ["ok" if code is None else "error" for code in codes]
    for finding in found:
        has_score = [getattr(finding, n) is not None for n in ("score", "p_value", "verdict", "log_likelihood")]
        assert has_score == [finding.status == "ok"] * 4
        assert finding.error is None or finding.error["message"].endswith(".")
    assert (found[1].width, found[1].height, found[1].format, found[1].stratum) == (300, 200, "JPEG", "jpeg|256-512")


def test_a_request_without_any_good_image_raises_no_exception(detector: Detector) -> None:
    assert [f.error and f.error["code"] for f in detector.detect([b"x", b""])] == ["unsupported_format", "empty"]
    assert detector.detect([]) == []
    assert detector.detect(b"").index == 0


def test_warnings_say_when_exif_is_absent_and_when_the_image_was_enlarged(detector: Detector) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    data = [
        encoded(picture(1, 224, 400), "JPEG", exif=exif),
        encoded(picture(1, 224, 400), "JPEG"),
        encoded(picture(1, 223, 400), "JPEG", exif=exif),
        encoded(picture(1, 100, 100)),
    ]
    assert [f.warnings for f in detector.detect(data)] == [
        [],
        ["no_exif"],
        ["enlarged_to_view"],
        ["no_exif", "enlarged_to_view"],
    ]


def test_an_alpha_that_is_too_small_for_the_calibration_is_refused(detector: Detector) -> None:
    assert detector.detect(encoded(picture(0)), alpha=1 / (CALIBRATION_SIZE + 1)).status == "ok"
    for data in (encoded(picture(0)), [encoded(picture(0))], [], [b""]):
        with pytest.raises(CalibrationError, match="larger alpha"):
            detector.detect(data, alpha=0.9 / (CALIBRATION_SIZE + 1))


def test_a_checkpoint_without_calibration_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CalibrationError, match="no calibration"):
        Detector(dataclasses.replace(checkpoint, calibration=None), device="cpu")


@pytest.mark.parametrize(
    "encoder", [TOWER.model_copy(update={"view": "crop"}), TOWER.model_copy(update={"pretrained": "seed:1"})]
)
def test_an_encoder_that_differs_from_the_checkpoints_is_refused(
    checkpoint: Checkpoint, encoder: EncoderConfig
) -> None:
    with pytest.raises(EncoderMismatchError, match=checkpoint.encoder_fingerprint):
        Detector(dataclasses.replace(checkpoint, encoder=encoder), device="cpu")


def test_embedded_images_have_the_scores_that_detect_gives_and_a_bad_image_has_an_error(detector: Detector) -> None:
    data = [encoded(picture(at)) for at in range(34)]
    data[1], data[33] = b"no image", b""
    embeddings = detector.embed(data)
    assert embeddings.values.shape == (34, 32) and embeddings.values.dtype == np.float32
    found = detector.detect(data)
    assert {at: error.item_code for at, error in embeddings.errors.items()} == {
        finding.index: finding.error["code"] for finding in found if finding.error is not None
    }
    scores = detector.score_embeddings(embeddings.values).score
    np.testing.assert_array_equal(scores, [np.nan if f.score is None else f.score for f in found])
    assert detector.embed([]).values.shape == (0, 32)


def test_embeddings_that_are_not_finite_or_all_zero_have_no_score(detector: Detector) -> None:
    rows = np.random.default_rng(3).normal(size=(5, 32)).astype(np.float32)
    alone = detector.score_embeddings(rows[2:3])
    rows[0, 5], rows[1], rows[3, 0] = np.nan, 0.0, -np.inf
    rows.flags.writeable = False
    scores = detector.score_embeddings(rows)
    for field in dataclasses.fields(scores):
        values = getattr(scores, field.name)
        assert values.dtype == np.float32 and values.shape == (5,)
        assert np.isnan(values).tolist() == [True, True, False, True, False], field.name
        np.testing.assert_allclose(values[2], getattr(alone, field.name)[0], rtol=1e-4)
    np.testing.assert_allclose(scores.log_base + scores.log_det, scores.log_likelihood, rtol=1e-5)


@pytest.mark.parametrize(("far", "scale"), [(0.0, 1e-6), (1e25, 1.0)], ids=["large", "overflowing float32"])
def test_the_score_of_an_extreme_embedding_saturates_and_can_be_written_as_json(
    checkpoint: Checkpoint, far: float, scale: float
) -> None:
    state = {**checkpoint.flow_state, "mean": torch.full((32,), far), "std": torch.full((32,), scale)}
    finding = Detector(dataclasses.replace(checkpoint, flow_state=state), device="cpu").detect(encoded(picture(0)))
    assert finding.status == "ok" and finding.score == 1e6
    assert finding.p_value == pytest.approx(1 / (CALIBRATION_SIZE + 1))
    assert finding.verdict == "likely_ai"
    json.dumps(dataclasses.asdict(finding), allow_nan=False)


def test_a_saved_checkpoint_gives_the_findings_of_the_one_in_memory(
    detector: Detector, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(checkpoint, tmp_path / "model")
    data = [encoded(picture(seed, 300, 260), "JPEG") for seed in range(3)] + [b"x"]
    for loaded in (Detector.from_checkpoint(tmp_path / "model", "cpu"), load_detector(str(tmp_path / "model"), "cpu")):
        assert loaded.detect(data) == detector.detect(data)
    with pytest.raises(CheckpointError):
        Detector.from_checkpoint(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def three() -> Checkpoint:
    """Three segments of two sizes, those that the rule of depth gives the test tower, on a flow that is not trained."""
    record = load_record(TOWER)
    segments = resolved((), TOWER, record)
    assert [each.name for each in segments] == ["block1.mean@224", "block2.cls@224.paired", "block2.cls@448.paired"]
    encoder, config = Encoder(TOWER, segments, "cpu"), FlowConfig(blocks=2, hidden=16)
    packed = [views(np.array(picture(seed, 300, 500)), encoder.view) for seed in range(100, 130)]
    embeddings = torch.from_numpy(joined(encoder(packed), segments))
    flow, generator = Flow((64, 64, 64), config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        flow.fit_standardizer(embeddings)
        flow.fit_scale(embeddings)
        scores = flow.eval()(embeddings).score.numpy()
    return Checkpoint(
        encoder=TOWER,
        encoder_fingerprint=encoder.fingerprint,
        view=encoder.view,
        segments=segments,
        widths=widths_of(segments, TOWER, record),
        flow_config=config,
        flow_state=flow.state_dict(),
        calibration=Calibration.fit(scores, ["png|256-512"] * len(scores)),
    )


def test_three_segments_of_two_sizes_give_one_score_by_bytes_and_by_views_after_saving(
    three: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(three, tmp_path / "model")
    loaded = Detector.from_checkpoint(tmp_path / "model", "cpu")
    assert (loaded.checkpoint.segments, loaded.checkpoint.view) == (three.segments, three.view)
    images = [np.array(picture(seed, 400 + 20 * seed, 420)) for seed in range(6)]
    data = [encoded(Image.fromarray(image)) for image in images]
    found = loaded.detect(data, alpha=0.1)
    scores = np.array([finding.score for finding in found], float)
    alone = [loaded.detect(item, alpha=0.1).score for item in data]
    np.testing.assert_allclose(np.array(alone, float), scores, rtol=1e-6, atol=1e-6)
    packed = np.stack([views(image, three.view) for image in images])
    np.testing.assert_allclose(loaded.score_views(packed).score, scores, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(Detector(three, "cpu").score_views(packed).score, scores, rtol=1e-6, atol=1e-6)

    # The score as the method says it: each segment on views of its own size, standardised and added.
    flow, of = three.flow().double(), dict(zip(three.view.sizes, by_size(packed, three.view.sizes), strict=True))
    encoders = [Encoder(TOWER, [each], "cpu") for each in three.segments]
    parts = [encoder.encode(of[encoder.view.sizes[0]], encoder.segments) for encoder in encoders]
    embedding = np.concatenate([next(iter(part.values())) for part in parts], axis=1)
    with torch.inference_mode():
        z, log_det = flow.transform(flow.standardize(torch.from_numpy(embedding).double()))
        densities = torch.distributions.Normal(0.0, 1.0).log_prob(z).split([64, 64, 64], dim=1)
        likelihood = (torch.stack([each.sum(dim=1) for each in densities], 1) + log_det) / 64
        expected = ((flow.centre - likelihood) / flow.spread).sum(dim=1).numpy()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.array([f.log_likelihood for f in found], float), 64 * likelihood.sum(dim=1).numpy(), rtol=1e-5
    )


def test_with_views_of_two_sizes_an_image_is_enlarged_if_it_is_smaller_than_the_larger_one(three: Checkpoint) -> None:
    data = [encoded(picture(1, side, side + 9)) for side in (300, 448)]
    warnings = [finding.warnings for finding in Detector(three, "cpu").detect(data, alpha=0.1)]
    assert ["enlarged_to_view" in each for each in warnings] == [True, False]


def test_an_encoder_without_the_outputs_of_a_checkpoint_is_refused_although_its_fingerprint_is_the_same(
    three: Checkpoint,
) -> None:
    other = Encoder(TOWER, [Segment(feature="projected", size=size) for size in (224, 448)], "cpu")
    assert other.fingerprint == three.encoder_fingerprint
    with pytest.raises(EncoderMismatchError, match=r"needs the outputs .*block1\.mean@224"):
        Detector(three, "cpu", encoder=other)


def test_no_finding_contains_the_words_real_fake_authentic_or_probability(detector: Detector) -> None:
    bad = [b"", b"x", encoded(picture(0, 20, 20)), encoded(picture(0), "JPEG")[:-9]]
    found = detector.detect([encoded(picture(seed)) for seed in range(30)] + bad, alpha=0.1)
    assert {f.verdict for f in found} == {*VERDICTS, None}
    said = json.dumps([dataclasses.asdict(f) for f in found]).lower()
    assert re.search(r"real|fake|authentic|probab", said) is None
