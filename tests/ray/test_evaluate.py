"""The evaluation protocol end to end, with the test tower and proxies standing in for the second class."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from clipflow_ray import proxies
from clipflow_ray.config import EvaluateConfig, ProxyConfig
from clipflow_ray.errors import ConfigError
from clipflow_ray.evaluate import report
from clipflow_ray.evaluate.protocol import evaluate
from clipflow_ray.model.checkpoint import load_checkpoint
from tests.conftest import encoded, photo


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """30 photo-like images of two sources, and 20 distorted ones of two "generators", one file of them broken."""
    root = tmp_path_factory.mktemp("labelled")
    config = ProxyConfig()
    for at in range(30):
        folder = root / "natural" / ("lake", "tower")[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{at}.jpg").write_bytes(encoded(photo(5000 + at)))
    for at in range(20):
        name = ("phase_jitter", "low_pass")[at % 2]
        folder = root / "generated" / name
        folder.mkdir(parents=True, exist_ok=True)
        view = proxies.proxy(photo(6000 + at), name, proxies.generator(0, str(at)), config)
        (folder / f"{at}.png").write_bytes(encoded(view, "PNG"))
    (root / "generated" / "low_pass" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root / "natural", root / "generated"


@pytest.fixture(scope="module")
def result(cluster: None, trained: str, labelled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    natural, generated = labelled
    output = tmp_path_factory.mktemp("evaluation")
    config = EvaluateConfig(
        natural=(str(natural),), generated=(str(generated),), output=str(output), checkpoint=trained, seeds=(trained,)
    )
    return {**evaluate(config), "output": str(output), "config": config}


def test_every_figure_can_be_derived_again_from_the_scores_that_it_ships(result: dict, trained: str) -> None:
    table = pq.read_table(f"{result['output']}/scores.parquet").to_pandas()
    threshold = load_checkpoint(trained).calibration.threshold(0.05)
    for variant, figures in result["variants"].items():
        rows = table[table.variant == variant]
        assert len(rows) == 50
        for column, name in (("score", "flow"), ("mahalanobis", "mahalanobis"), ("knn", "knn")):
            expected = roc_auc_score(rows.generated, rows[column])
            assert figures["detectors"][name]["auroc"] == pytest.approx(expected, abs=1e-6)
        at = figures["thresholds"]["0.05"]
        assert at["tpr"]["flagged"] == int((rows.generated & (rows.score > threshold)).sum())
        assert at["fpr"]["flagged"] == int((~rows.generated & (rows.score > threshold)).sum())
        assert sum(row["of"] for row in at["per_source"].values()) == 30
        assert sum(row["of"] for row in at["per_generator"].values()) == 20
        generators = figures["detectors"]["flow"]["per_generator_auroc"]
        assert figures["detectors"]["flow"]["macro_auroc"] == pytest.approx(np.mean(list(generators.values())))
    assert result["auroc"] == result["variants"]["as_found"]["detectors"]["flow"]["auroc"]


def test_all_baselines_stand_beside_the_flow_and_the_unreadable_image_is_counted(result: dict) -> None:
    for figures in result["variants"].values():
        assert set(figures["detectors"]) == {"flow", "mahalanobis", "knn", "natural_only_flow", "logistic_probe"}
        assert figures["n"] == {"natural": 30, "generated": 20}
        assert len(set(figures["auroc_by_seed"])) == 1
    assert result["unreadable"] == 1
    assert result["metadata_only_auroc"] == pytest.approx(1.0)  # JPEG against PNG: the bias that it is there to show


def test_the_written_figures_are_the_returned_ones_and_the_text_names_worst_generator_first(result: dict) -> None:
    written = json.loads(Path(result["output"], "figures.json").read_text())
    assert written["auroc"] == result["auroc"]
    text = report.text(written)
    order = list(written["variants"]["as_found"]["detectors"]["flow"]["per_generator_auroc"])
    block = text[text.index("worst first") :]
    assert block.index(order[0]) < block.index(order[1])


def test_a_second_evaluation_encodes_nothing_again(result: dict) -> None:
    folder = Path(result["output"], "evaluation", "embeddings")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    evaluate(result["config"])
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_missing_class_is_refused(cluster: None, result: dict) -> None:
    with pytest.raises(ConfigError, match="--generated"):
        evaluate(result["config"].model_copy(update={"generated": ()}))
