"""Each tower can be trained, and audit, Detector and endpoint then give the same scores."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from ray import serve

from clipflow_ray.audit.run import audit
from clipflow_ray.config import (
    TEST_TOWER,
    AuditConfig,
    EncoderConfig,
    FitConfig,
    FlowConfig,
    ProxyConfig,
    Segment,
    SplitConfig,
    TrainConfig,
)
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.train.run import train
from tests.conftest import encoded, photo
from tests.ray.site import deploy, free_port, until
from tests.towers import TOWERS

FAMILIES = ("low_pass", "tone")
SOURCES = ("alpine", "harbour", "kitchen", "market")
ALPHA = 0.5
# Each takes a minute, so the others run in `make stress`. This one differs from the packaged tower in size,
# normalisation, resize mode and trunk.
IN_CI = ("PE-Core-T-16-384",)


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
def endpoint(cluster: None) -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 40})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.stress) for name in TOWERS]
)
def test_a_tower_trains_audits_detects_and_serves(name: str, endpoint: str, pictures: Path, tmp_path: Path) -> None:
    tower = TOWERS[name]
    checkpoint = scored_alike(tower.write(tmp_path / "repository"), tower.segments, endpoint, pictures, tmp_path)
    assert (checkpoint.view.sizes, checkpoint.segments, checkpoint.widths) == (
        (tower.size,),
        tower.segments,
        tower.widths,
    )
    assert (checkpoint.view.resize_mode, checkpoint.view.mean) == (
        tower.preprocess["resize_mode"],
        tower.preprocess["mean"],
    )


def test_a_tower_without_segments_trains_those_of_the_rule_of_depth(
    endpoint: str, pictures: Path, tmp_path: Path
) -> None:
    encoder = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    checkpoint = scored_alike(encoder, (), endpoint, pictures, tmp_path)
    names = [each.name for each in checkpoint.segments]
    assert names == ["block1.mean@224", "block2.cls@224.paired", "block2.cls@448.paired"]
    assert (checkpoint.view.sizes, checkpoint.widths) == ((224, 448), (64, 64, 64))


def scored_alike(
    encoder: EncoderConfig, segments: tuple[Segment, ...], endpoint: str, pictures: Path, tmp_path: Path
) -> Checkpoint:
    """Train a checkpoint and return it; fails unless audit, Detector and endpoint give the same scores by it."""
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
    found = Detector(checkpoint).detect([file.read_bytes() for file in files], ALPHA)
    scores = np.array([finding.score for finding in found])
    assert np.isfinite(scores).all() and np.ptp(scores) > 1e-3
    enlarged = ["enlarged_to_view" in finding.warnings for finding in found]
    assert enlarged == [min(finding.width or 0, finding.height or 0) < max(checkpoint.view.sizes) for finding in found]

    output = tmp_path / "audit"
    audit(AuditConfig(input=(str(pictures),), output=str(output), checkpoint=trained, alpha=ALPHA, gallery=0))
    ledger = pq.read_table(output / "ledger", columns=["uri", "score"]).sort_by("uri")
    np.testing.assert_allclose(ledger["score"].to_numpy(), scores, rtol=1e-6, atol=1e-6)

    deploy(trained, alpha=ALPHA)
    with httpx.Client(base_url=endpoint, timeout=60) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        uploads = [("files", (file.name, file.read_bytes())) for file in files]
        answer = client.post("/v1/detect", files=uploads).json()
    assert answer["model"]["model_id"] == checkpoint.model_id
    np.testing.assert_allclose([item["score"] for item in answer["results"]], scores, rtol=1e-6, atol=1e-6)
    return checkpoint
