"""The evaluation protocol end to end, with the test tower; proxies are the second class."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from sklearn.metrics import roc_auc_score

from clipflow_ray import proxies
from clipflow_ray.config import EvaluateConfig, InventoryOptions, ProxyConfig
from clipflow_ray.errors import ConfigError
from clipflow_ray.evaluate import figures as derived
from clipflow_ray.evaluate.baselines import BASELINES
from clipflow_ray.evaluate.protocol import evaluate, metadata_only
from clipflow_ray.evaluate.record import ClassCounts, EvaluationFigures
from clipflow_ray.evaluate.text import text
from clipflow_ray.evaluate.views import CASES, VARIANTS
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import load_checkpoint
from tests.conftest import encoded, photo

SERIOUS = ("serious", "critical")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """30 photo-like images of two sources, and 20 distorted images of two "generators", one of them broken."""
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
def config(trained: str, labelled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    natural, generated = labelled
    output = tmp_path_factory.mktemp("evaluation")
    return EvaluateConfig(
        natural=(str(natural),),
        generated=(str(generated),),
        output=str(output),
        checkpoint=trained,
        seeds=(trained, trained),
        robustness=6,
        gallery=3,
    )


@pytest.fixture(scope="module")
def result(cluster: None, config: EvaluateConfig) -> EvaluationFigures:
    return evaluate(config)


def shipped(config: EvaluateConfig, name: str) -> pa.Table:
    return pq.read_table(f"{config.output}/{name}.parquet")


def test_every_figure_is_derived_again_from_the_shipped_tables_alone(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    written = json.loads(Path(config.output, "figures.json").read_text())
    stored, scores = shipped(config, "calibration"), shipped(config, "scores")
    own = stored.slice(0, len(stored) // 3)  # the same checkpoint is given three times
    source = own["source"].to_numpy().astype(np.int32)
    assert set(own["source_weight"].to_pylist()) == {1 / (source.max() + 1)}
    scores_of_naturals = own["score"].to_numpy().astype(np.float32)
    calibration = Calibration(scores_of_naturals, tuple(own["stratum"].to_pylist()), source)
    alphas = derived.supported([calibration] * 3, None)
    again = json.loads(derived.figures(scores, [calibration] * 3, alphas).model_dump_json())
    assert again == {name: written[name] for name in again}
    curves = derived.curves(shipped(config, "robustness"), calibration, alphas)
    assert [json.loads(point.model_dump_json()) for point in curves] == written["robustness"]
    for variant in written["variants"]:
        rows = scores.filter(pc.equal(scores["variant"], variant))
        suspicion = metadata_only({n: rows[n] for n in rows.column_names}, rows["generated"].to_numpy())
        np.testing.assert_allclose(suspicion, rows["metadata_only"].to_numpy(), rtol=1e-5)
        p_values = calibration.p_value(rows["score"].to_numpy().astype(np.float32))
        np.testing.assert_array_equal(p_values, rows["p_value"].to_numpy())


def test_the_figures_are_what_their_names_say(result: EvaluationFigures, config: EvaluateConfig, trained: str) -> None:
    table = shipped(config, "scores").to_pandas()
    fitted = load_checkpoint(trained).calibration
    assert fitted is not None
    threshold = fitted.threshold(0.05)
    for variant, figures in result.variants.items():
        rows = table[table.variant == variant]
        assert len(rows) == 50
        for column, name in (("score", "flow"), ("mahalanobis", "mahalanobis"), ("knn", "knn")):
            expected = roc_auc_score(rows.generated, rows[column])
            assert figures.detectors[name].auroc == pytest.approx(expected, abs=1e-6)
        at = figures.thresholds["0.05"]
        assert at.tpr.flagged == int((rows.generated & (rows.score > threshold)).sum())
        assert at.fpr.flagged == int((~rows.generated & (rows.score > threshold)).sum())
        assert sum(row.of for row in at.per_source.values()) == 30
        assert sum(row.of for row in at.per_generator.values()) == 20
        generators = figures.detectors["flow"].per_generator_auroc
        assert figures.detectors["flow"].macro_auroc == pytest.approx(np.mean(list(generators.values())))
    assert result.auroc == result.variants["as_found"].detectors["flow"].auroc


def test_what_is_audited_together_gives_a_lower_bound_of_what_is_suspicious(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    for at in result.variants["as_found"].thresholds.values():
        together = at.audited_together
        assert together.count == at.tpr.flagged + at.fpr.flagged and together.of == 50
        assert together.generated_share == pytest.approx(0.4)
        assert together.excess_lower_bound is not None and together.share is not None
        assert 0 <= together.excess_lower_bound < together.share


def test_the_spread_over_seeds_is_zero_if_all_seeds_are_the_same(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    spread = result.variants["as_found"].over_seeds
    assert {"auroc", "macro_auroc", "worst_quartile_auroc", "tpr_0.05", "fpr_0.05"} <= set(spread)
    assert all(row.std == pytest.approx(0) for row in spread.values())


def test_robustness_distorts_both_classes_with_the_same_draws(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    table = shipped(config, "robustness").to_pandas()
    points = result.robustness
    assert [(point.distortion, point.level) for point in points] == [("original", 0.0), *CASES]
    assert all(point.n == ClassCounts(natural=6, generated=6) for point in points)
    assert len(table) == 12 * (1 + len(CASES))
    for _, rows in table.groupby(["distortion", "level"]):
        assert sorted(rows[rows.generated].draw) == sorted(rows[~rows.generated].draw) == list(range(6))
    scores = shipped(config, "scores").to_pandas()
    known = scores[scores.variant == "as_found"].set_index("row_id").score
    originals = table[table.distortion == "original"].set_index("row_id").score
    np.testing.assert_array_equal(originals, known[originals.index])
    assert (table[table.distortion == "blur"].score.to_numpy()[-12:] != originals.to_numpy()).any()


def test_every_baseline_has_figures_and_the_unreadable_image_is_counted(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    for figures in result.variants.values():
        assert list(figures.detectors) == ["flow", *BASELINES]
        assert figures.n == ClassCounts(natural=30, generated=20)
        assert len(set(figures.auroc_by_seed)) == 1
    assert result.unreadable == 1
    assert list(result.variants) == [*VARIANTS]
    counts = {name: (cell.n.natural, cell.n.generated) for name, cell in result.by_format.items()}
    assert counts == {"JPEG": (30, 0), "PNG": (0, 20)}
    assert {name: cell.n for name, cell in result.by_size.items()} == {
        "below 512 pixels": ClassCounts(natural=30, generated=20)
    }
    assert result.metadata_only_auroc == pytest.approx(1.0)  # JPEG against PNG: the figure exists to show this bias
    flow = result.variants["as_found"].detectors["flow"].auroc
    assert result.format_gap_auroc["flow"] == pytest.approx(
        flow - result.variants["format_aligned"].detectors["flow"].auroc
    )
    for figures in result.variants.values():
        assert list(figures.comparisons) == [*BASELINES]
        for name, row in figures.comparisons.items():
            difference = figures.detectors["flow"].auroc - figures.detectors[name].auroc
            assert row.auroc_difference == pytest.approx(difference)
            low, high = row.difference_95
            assert row.outcome == ("higher" if low > 0 else "lower" if high < 0 else "no difference beyond the noise")


def test_the_written_figures_are_the_returned_ones_and_the_text_names_worst_generator_first(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    written = EvaluationFigures.model_validate_json(Path(config.output, "figures.json").read_text())
    assert written == result
    printed = text(written)
    order = list(written.variants["as_found"].detectors["flow"].per_generator_auroc)
    block = printed[printed.index("worst first") :]
    assert block.index(order[0]) < block.index(order[1])


def test_a_second_evaluation_encodes_nothing_again(result: EvaluationFigures, config: EvaluateConfig) -> None:
    folders = [Path(config.output, name, "embeddings") for name in ("evaluation", "robustness-6")]
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    again = evaluate(config)
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    assert again == result


def test_a_recompressed_image_has_its_own_sides_and_the_bytes_of_its_re_encoding(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    table = shipped(config, "scores").to_pandas()
    found, recompressed = (table[table.variant == name].set_index("row_id") for name in ("as_found", "recompressed"))
    recompressed = recompressed.loc[found.index]
    assert (recompressed.format == "JPEG").all()
    for name in ("width", "height", "group", "generated"):
        assert (recompressed[name] == found[name]).all()
    assert (recompressed.bytes[found.generated] < found.bytes[found.generated]).all()  # these were PNG
    assert (recompressed.score != found.score).any()


def test_lists_and_tables_give_the_scores_of_the_files_that_they_hold_at_the_asked_alpha(
    result: EvaluationFigures, config: EvaluateConfig, labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    natural, generated = (sorted(path for path in root.rglob("*.*") if path.name != "broken.png") for root in labelled)
    (tmp_path / "natural.csv").write_text("path\n" + "\n".join(map(str, natural)))
    images = [{"png": path.read_bytes(), "model": path.parent.name} for path in generated]
    pq.write_table(pa.Table.from_pylist(images), tmp_path / "generated.parquet")
    listed = EvaluateConfig(
        natural=(str(tmp_path / "natural.csv"),),
        generated=(str(tmp_path / "generated.parquet"),),
        output=str(tmp_path / "out"),
        checkpoint=config.checkpoint,
        alpha=0.1,
        inventory=InventoryOptions(uri_column="path", bytes_column="png", group_column="model"),
        gallery=2,
    )
    again = evaluate(listed)
    assert (again.n, again.unreadable) == (result.n, 0)
    assert again.auroc == pytest.approx(result.auroc)
    for figures in again.variants.values():
        assert list(figures.thresholds) == ["0.1"]
        assert set(figures.detectors["flow"].per_generator_auroc) == {"phase_jitter", "low_pass"}
    assert sum(row.of for row in again.variants["as_found"].thresholds["0.1"].per_source.values()) == 30
    assert Path(listed.output, "report.html").exists()


def test_a_missing_class_is_refused(cluster: None, config: EvaluateConfig) -> None:
    with pytest.raises(ConfigError, match="--generated"):
        evaluate(config.model_copy(update={"generated": ()}))


def test_the_page_is_one_file_with_the_figures_and_the_worst_errors_first(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    page = Path(config.output, "report.html").read_text()
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:|["'#])[^>\s]*""", page)
    found = result.variants["as_found"]
    errors = [found.thresholds["0.05"].fpr.flagged, 20 - found.thresholds["0.05"].tpr.flagged]
    assert page.count("data:image/jpeg;base64,") == sum(min(3, count) for count in errors) > 0
    assert f"{result.auroc:.3f} as found" in page
    for name in ("lake", "tower", "phase_jitter", "low_pass"):
        assert f"<td>{name}</td>" in page
    scores = shipped(config, "scores").to_pandas()
    scores = scores[(scores.variant == "as_found") & scores.generated].sort_values("score")
    missed = scores[scores.p_value > 0.05].uri.map(lambda uri: Path(uri).name).head(3)
    gallery = page[page.index("missed, lowest score first") :]
    assert re.findall(r"<br>([^<]*\.png)</p>", gallery) == list(missed)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's `chromium` to test the page")
def test_the_page_fits_a_phone_sorts_its_tables_and_sends_no_request(
    result: EvaluationFigures, config: EvaluateConfig
) -> None:
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 390, "height": 800})
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: None if request.url[:5] in ("file:", "data:") else problems.append(request.url)
        )
        page.goto(f"file://{config.output}/report.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        rows = page.locator("table:has(button:text-is('detector')) tbody tr td:first-child")
        page.get_by_role("button", name="AUROC as found").click()
        found = result.variants["as_found"]
        table = {**found.detectors, "metadata_only": found.metadata_only}
        ranked = sorted((row.auroc for row in table.values()), reverse=True)
        shown = [name.replace(" ", "_") for name in rows.all_inner_texts()]
        assert [table[name].auroc for name in shown] == ranked
        figures = page.locator("figure").all()
        assert len(figures) == 13  # three ROC curves and histograms, the p-values, six kinds of distortion
        assert all(figure.get_attribute("aria-label") for figure in figures)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            violations = Axe().run(page).response["violations"]
            assert not [f"{rule['id']}: {rule['nodes']}" for rule in violations if rule["impact"] in SERIOUS]
        browser.close()
    assert not problems
