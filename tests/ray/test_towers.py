"""Each tower can be trained and calibrated, and audit, Detector and endpoint then give the same scores."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
from ray import serve

from clipflow_ray.audit.run import audit
from clipflow_ray.calibrate import MIN_PHOTOGRAPHS, calibrate
from clipflow_ray.config import (
    RECIPES,
    TEST_TOWER,
    AuditConfig,
    CalibrateConfig,
    EncoderConfig,
    FitConfig,
    FlowConfig,
    ProxyConfig,
    Segment,
    SplitConfig,
    TrainConfig,
    load_yaml,
)
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.train.run import train
from tests.conftest import encoded, photo
from tests.ray.site import deploy, free_port, until
from tests.towers import TOWERS, Tower

FAMILIES = ("low_pass", "tone")
SOURCES = ("alpine", "harbour", "kitchen", "market")
ALPHA = 0.5
# Two narrow blocks of open_clip's own towers. timm has no such setting, but a smaller tower of the same kind.
NARROW = {"layers": 2, "width": 128, "head_width": 64}
SMALL: dict[str, dict[str, Any]] = {
    "default": NARROW,
    "metaclip2-worldwide": NARROW,
    "vit-l-14-336": NARROW,
    "pe-core-l-14-336": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "image_size": 384},
    "siglip2-b-16-256": {},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sources of two images; some are smaller than the views and some larger."""
    root = tmp_path_factory.mktemp("pictures")
    for number, source in enumerate(SOURCES):
        (root / source).mkdir()
        for at in range(2):
            data = encoded(photo(10 * number + at, (220 + 180 * at, 300 + 60 * number)))
            (root / source / f"{at}.jpg").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def album(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that does not train, with as many images as a calibration needs beside `pictures`."""
    root = tmp_path_factory.mktemp("more")
    (root / "album").mkdir()
    for at in range(MIN_PHOTOGRAPHS - len(list(pictures.glob("*/*.jpg")))):
        (root / "album" / f"{at:02d}.jpg").write_bytes(encoded(photo(1000 + at, (220, 260))))
    return root


@pytest.fixture(scope="module")
def endpoint(cluster: None) -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 40})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.stress  # each takes a minute; the unit tests check their features and views
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_trains_audits_calibrates_detects_and_serves(
    name: str, endpoint: str, pictures: Path, album: Path, tmp_path: Path
) -> None:
    tower = TOWERS[name]
    encoder = tower.write(tmp_path / "repository")
    checkpoint = scored_alike(encoder, tower.segments, endpoint, pictures, album, tmp_path)
    assert (checkpoint.view.sizes, checkpoint.segments, checkpoint.widths) == (
        (tower.size,),
        tower.segments,
        tower.widths,
    )
    assert (checkpoint.view.resize_mode, checkpoint.view.mean) == (
        tower.preprocess["resize_mode"],
        tower.preprocess["mean"],
    )


@pytest.mark.stress
@pytest.mark.parametrize("name", RECIPES)
def test_the_segments_of_a_recipe_train_audit_calibrate_detect_and_serve(
    name: str, endpoint: str, pictures: Path, album: Path, tmp_path: Path
) -> None:
    """With random weights of a small tower of the same kind, whose blocks stand for those that the recipe names."""
    config = load_yaml(TrainConfig, RECIPES[name], {"output": "unused"})
    tag = "openai" if name == "default" else config.encoder.pretrained
    published = open_clip.get_pretrained_cfg(config.encoder.model, tag)
    preprocess = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    tower = Tower(config.encoder.model, 0, preprocess, (), (), (), SMALL[name])
    segments = shallow(config.segments)
    checkpoint = scored_alike(tower.write(tmp_path / "repository"), segments, endpoint, pictures, album, tmp_path)
    assert checkpoint.segments == segments
    assert checkpoint.view.sizes == tuple(sorted({segment.size or 0 for segment in config.segments}))
    assert checkpoint.view.resize_mode == published["resize_mode"]


def shallow(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The same segments with their blocks numbered anew from 1, in order."""
    blocks = sorted({int(number) for segment in segments for number in re.findall(r"\d+", segment.feature)})

    def renumbered(found: re.Match[str]) -> str:
        return str(1 + blocks.index(int(found[0])))

    features = [re.sub(r"\d+", renumbered, segment.feature) for segment in segments]
    return tuple(segment.model_copy(update={"feature": name}) for segment, name in zip(segments, features, strict=True))


@pytest.mark.stress
def test_a_tower_without_segments_trains_those_of_the_rule_of_depth(
    endpoint: str, pictures: Path, album: Path, tmp_path: Path
) -> None:
    encoder = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    checkpoint = scored_alike(encoder, (), endpoint, pictures, album, tmp_path)
    names = [each.name for each in checkpoint.segments]
    assert names == ["block1.mean@224", "block2.cls@224.paired", "block2.cls@448.paired"]
    assert (checkpoint.view.sizes, checkpoint.widths) == ((224, 448), (64, 64, 64))


def scored_alike(
    encoder: EncoderConfig, segments: tuple[Segment, ...], endpoint: str, pictures: Path, album: Path, tmp_path: Path
) -> Checkpoint:
    """Train a checkpoint on `pictures` and return it.

    Fails unless audit, Detector and endpoint give the same scores by it, and Detector also after a calibration on
    `pictures` and `album`.
    """
    families = ProxyConfig().families
    config = TrainConfig(
        input=(str(pictures),),
        output=str(tmp_path / "trained"),
        encoder=encoder,
        segments=segments,
        proxies=ProxyConfig(
            natural_views=2, proxies_per_view=2, families={family: families[family] for family in FAMILIES}
        ),
        flow=FlowConfig(blocks=2, hidden=16),
        fit=FitConfig(epochs=2, batch_size=4),
        split=SplitConfig(validation=("alpine",), calibration=("harbour",), held_out_family="low_pass"),
        allow_small=True,
    )
    trained = train(config).checkpoint
    checkpoint = load_checkpoint(trained)
    files = sorted(pictures.glob("*/*.jpg"))
    contents = [file.read_bytes() for file in files]
    found = Detector(checkpoint).detect(contents, ALPHA)
    scores = np.array([finding.score for finding in found])
    assert np.isfinite(scores).all() and np.ptp(scores) > 1e-3
    enlarged = ["enlarged_to_view" in finding.warnings for finding in found]
    assert enlarged == [min(finding.width or 0, finding.height or 0) < max(checkpoint.view.sizes) for finding in found]

    output = tmp_path / "audit"
    inputs = (str(pictures), str(album))
    audit(AuditConfig(input=inputs, output=str(output), checkpoint=trained, alpha=ALPHA, gallery=0))
    ledger = pq.read_table(output / "ledger", columns=["uri", "score"]).to_pylist()
    audited = {row["uri"]: row["score"] for row in ledger}
    assert len(audited) == MIN_PHOTOGRAPHS
    np.testing.assert_allclose([audited[str(file)] for file in files], scores, rtol=1e-6, atol=1e-6)

    calibrated = calibrate(
        CalibrateConfig(input=(str(output),), output=str(tmp_path / "calibrated"), checkpoint=trained)
    )
    again = Detector.from_checkpoint(calibrated.checkpoint)
    assert calibrated.model_id == again.checkpoint.model_id == checkpoint.model_id
    assert again.calibration.calibration_id == calibrated.calibration_after != calibrated.calibration_before
    assert [finding.score for finding in again.detect(contents, ALPHA)] == [finding.score for finding in found]

    deploy(trained, alpha=ALPHA)
    with httpx.Client(base_url=endpoint, timeout=60) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        uploads = [("files", (file.name, data)) for file, data in zip(files, contents, strict=True)]
        answer = client.post("/v1/detect", files=uploads).json()
    assert answer["model"]["model_id"] == checkpoint.model_id
    np.testing.assert_allclose([item["score"] for item in answer["results"]], scores, rtol=1e-6, atol=1e-6)
    return checkpoint
