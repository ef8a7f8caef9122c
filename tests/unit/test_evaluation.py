"""What an evaluation says: labels, figures by format and size, the asked alpha, text and page."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from clipflow_ray.cli import app
from clipflow_ray.config import (
    DISCLAIMER,
    TEST_TOWER,
    EncoderConfig,
    EvaluateConfig,
    FlowConfig,
    ImageLimits,
    InventoryOptions,
)
from clipflow_ray.errors import CalibrationError, ConfigError, InputError
from clipflow_ray.evaluate.baselines import BASELINES
from clipflow_ray.evaluate.embeddings import labelled
from clipflow_ray.evaluate.figures import figures, sizes, supported
from clipflow_ray.evaluate.protocol import evaluate, file_columns
from clipflow_ray.evaluate.record import ClassCounts, DerivedFigures, EvaluationFigures
from clipflow_ray.evaluate.report import write_page
from clipflow_ray.evaluate.text import text
from clipflow_ray.evaluate.views import VARIANTS
from clipflow_ray.inputs.format import row_id
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint, save_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.flow import Flow
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run
from clipflow_ray.statistics import auroc, wilson
from tests.conftest import encoded, photo

OPTIONS = InventoryOptions()
CALIBRATION = Calibration.fit(np.random.default_rng(1).normal(0, 1, 399).astype(np.float32), ["jpeg|0-256"] * 399)


def score_table() -> pa.Table:
    """120 natural and 60 generated images in each variant, with scores that the flow ranks better than knn."""
    rng = np.random.default_rng(0)
    generated = np.arange(180) >= 120
    names = np.where(generated, np.array(["paint", "diffuse"])[np.arange(180) % 2], "lake")
    parts = []
    for variant in VARIANTS:
        score = rng.normal(0, 1, 180) + generated * (1.5 if variant == "as_found" else 0.5)
        parts.append(
            pa.table(
                {
                    "row_id": [row_id(str(at)) for at in range(180)],
                    "uri": [f"/images/{at}" for at in range(180)],
                    "variant": [variant] * 180,
                    "group": names,
                    "generated": generated,
                    # 100 JPEG and 20 PNG photographs, 56 JPEG and 4 WEBP generated images
                    "format": ["JPEG"] * 100 + ["PNG"] * 20 + ["JPEG"] * 56 + ["WEBP"] * 4,
                    "width": np.where(np.arange(180) % 3, 4000, 300),
                    "height": np.where(np.arange(180) % 3, 600, 700),
                    "score": score,
                    "p_value": CALIBRATION.p_value(score.astype(np.float32)),
                    **{name: score + rng.normal(0, 0.01, 180) for name in BASELINES},
                    "knn": rng.normal(0, 1, 180),
                    "metadata_only": rng.normal(0, 1, 180),
                }
            )
        )
    return pa.concat_tables(parts)


@pytest.fixture(scope="module")
def derived() -> DerivedFigures:
    """The figures of `score_table` at alpha 0.1."""
    return figures(score_table(), [CALIBRATION], supported([CALIBRATION], 0.1))


@pytest.fixture(scope="module")
def result(derived: DerivedFigures) -> EvaluationFigures:
    return EvaluationFigures(
        disclaimer=DISCLAIMER,
        model_id="m" * 16,
        calibration_id=CALIBRATION.calibration_id,
        seed_model_ids=(),
        natural=("/natural",),
        generated=("/generated",),
        **dict(derived),
        unreadable=0,
        unreadable_by_code={},
        robustness=(),
    )


def test_each_format_has_its_own_auroc_and_rates_and_a_small_class_has_counts_only(derived: DerivedFigures) -> None:
    cells = derived.by_format
    assert list(cells) == ["JPEG", "PNG", "WEBP"]
    rows = score_table().to_pandas()
    jpeg = rows[(rows.variant == "as_found") & (rows.format == "JPEG")]
    values = jpeg.score[~jpeg.generated].to_numpy(), jpeg.score[jpeg.generated].to_numpy()
    assert cells["JPEG"].n == ClassCounts(natural=100, generated=56)
    assert cells["JPEG"].auroc == pytest.approx(auroc(*values))
    assert cells["JPEG"].auroc_95 is not None
    assert cells["JPEG"].auroc_95[0] < auroc(*values) < cells["JPEG"].auroc_95[1]
    for found, own in ((cells["JPEG"].fpr["0.1"], values[0]), (cells["JPEG"].tpr["0.1"], values[1])):
        assert (found.flagged, found.of) == (int((own > CALIBRATION.threshold(0.1)).sum()), len(own))
        assert found.wilson_95 == wilson(found.flagged, found.of)
    assert cells["WEBP"].n == ClassCounts(natural=0, generated=4)
    assert cells["WEBP"].auroc is None and cells["WEBP"].auroc_95 is None
    assert cells["WEBP"].fpr == {} and cells["WEBP"].tpr["0.1"].of == 4
    assert cells["PNG"].auroc is None and cells["PNG"].tpr == {} and cells["PNG"].fpr["0.1"].of == 20


def test_images_are_counted_by_their_short_side_whose_ranges_end_before_the_next_begins(
    derived: DerivedFigures,
) -> None:
    cells = derived.by_size
    assert {name: (cell.n.natural, cell.n.generated) for name, cell in cells.items()} == {
        "below 512 pixels": (40, 20),
        "512 to 1023 pixels": (80, 40),
    }
    width, height = np.array([511, 512, 5000, 1024, 2048]), np.array([900, 900, 1023, 1024, 2048])
    assert list(sizes(width, height)) == [
        "below 512 pixels",
        "512 to 1023 pixels",
        "512 to 1023 pixels",
        "1024 to 2047 pixels",
        "2048 pixels and more",
    ]


def test_a_baseline_that_is_as_good_is_no_different_and_one_that_guesses_is_not(derived: DerivedFigures) -> None:
    comparisons = derived.variants["as_found"].comparisons
    assert set(comparisons) == set(BASELINES)
    assert comparisons["knn"].outcome == "higher"
    detectors = derived.variants["as_found"].detectors
    assert comparisons["knn"].auroc_difference == detectors["flow"].auroc - detectors["knn"].auroc
    assert comparisons["mahalanobis"].outcome == "no difference beyond the noise"


def test_figures_are_given_at_the_asked_alpha_alone(derived: DerivedFigures) -> None:
    for variant in derived.variants.values():
        assert list(variant.thresholds) == ["0.1"]
        assert list(variant.detectors["flow"].oracle_tpr) == ["0.1"]
    assert list(derived.by_format["JPEG"].tpr) == ["0.1"]


def test_without_an_asked_alpha_those_are_taken_that_every_calibration_supports() -> None:
    small = Calibration.fit(np.arange(50, dtype=np.float32), ["x"] * 50)
    assert supported([CALIBRATION], None) == [0.01, 0.05]
    assert supported([CALIBRATION, small], None) == [0.05]
    tiny = Calibration.fit(np.arange(5, dtype=np.float32), ["x"] * 5)
    with pytest.raises(CalibrationError, match="at least 19 natural images"):
        supported([CALIBRATION, tiny], None)


def test_an_alpha_below_the_floor_of_the_calibration_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    encoder = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    tower, config = Encoder(encoder), FlowConfig(blocks=1, hidden=4)
    flow = Flow(tower.widths, config)
    flow.fit_standardizer(torch.randn(8, *tower.widths))
    checkpoint = Checkpoint(
        encoder=encoder,
        encoder_fingerprint=tower.fingerprint,
        view=tower.view,
        segments=tower.segments,
        widths=tower.widths,
        flow_config=config,
        flow_state=flow.state_dict(),
        calibration=CALIBRATION,
    )
    save_checkpoint(checkpoint, Place.at(tmp_path / "checkpoint"))
    config_of = EvaluateConfig(
        natural=(str(tmp_path / "a"),),
        generated=(str(tmp_path / "b"),),
        output=str(tmp_path / "out"),
        checkpoint=str(tmp_path / "checkpoint"),
        alpha=0.001,
    )
    with pytest.raises(CalibrationError, match=r"0\.001 is below 1 / \(n \+ 1\)"):
        evaluate(config_of)
    assert not (tmp_path / "out").exists()


def test_a_recompressed_file_keeps_its_sides_and_an_aligned_one_has_those_of_the_alignment() -> None:
    names = ("row_id", "uri", "member", "group")
    rows = pa.table(
        {name: ["x"] for name in names}
        | {"width": [900], "height": [600], "format": ["PNG"], "bytes": [5000]}
        | {"aligned_bytes": [40], "recompressed_bytes": [70]}
    )
    described = {
        variant: [file_columns(rows, variant)[name].to_pylist() for name in ("format", "width", "height", "bytes")]
        for variant in VARIANTS
    }
    assert described == {
        "as_found": [["PNG"], [900], [600], [5000]],
        "format_aligned": [["JPEG"], [448], [448], [40]],
        "recompressed": [["JPEG"], [900], [600], [70]],
    }


def test_a_label_comes_from_the_kind_of_input_that_lists_the_image(tmp_path: Path) -> None:
    for at in range(4):
        (tmp_path / f"{at}.jpg").write_bytes(encoded(photo(at, (40, 40))))
    (tmp_path / "natural.csv").write_text("path,source\n0.jpg,lake\n1.jpg,lake\n")
    pq.write_table(
        pa.table({"image": [encoded(photo(9, (40, 40)))] * 3, "model": ["a", "b", "b"]}), tmp_path / "fake.parquet"
    )
    options = InventoryOptions(uri_column="path", group_column="source", bytes_column="image")
    natural, generated = [Place.at(tmp_path / "natural.csv")], [Place.at(tmp_path / "fake.parquet")]
    table = labelled(natural, generated, options)
    assert table["generated"].to_pylist() == [False, False, True, True, True]
    assert table["input_format"].to_pylist() == ["manifest"] * 2 + ["parquet"] * 3
    assert table["group"].to_pylist()[:2] == ["lake", "lake"]
    with pytest.raises(InputError, match=r"fake\.parquet has no column 'sauce'; it has image, model"):
        labelled(natural, generated, options.model_copy(update={"group_column": "sauce"}))


def test_what_a_natural_input_shares_with_a_generated_one_is_generated(tmp_path: Path) -> None:
    for name in ("lake/0.jpg", "ai/1.jpg", "ai/2.jpg", "tables/3.jpg"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(encoded(photo(1, (40, 40))))
    pq.write_table(pa.table({"image": [encoded(photo(9, (40, 40)))]}), tmp_path / "all" / "tables" / "more.parquet")
    whole = [Place.at(tmp_path / "all")]
    inside = [Place.at(tmp_path / "all" / "ai"), Place.at(tmp_path / "all" / "tables" / "more.parquet")]
    rows = labelled(whole, inside, OPTIONS).to_pylist()
    assert {(Path(row["uri"]).name, row["generated"]) for row in rows} == {
        ("0.jpg", False),
        ("3.jpg", False),
        ("1.jpg", True),
        ("2.jpg", True),
        ("more.parquet", True),
    }
    assert len({row["row_id"] for row in rows}) == len(rows) == 5


@pytest.mark.parametrize("natural", ["both.parquet", "folder/part"])
def test_an_input_that_would_have_both_labels_is_refused(tmp_path: Path, natural: str) -> None:
    inside = {"both.parquet": "both.parquet", "folder/part": "folder"}[natural]
    config = EvaluateConfig(
        natural=(str(tmp_path / natural),), generated=(str(tmp_path / inside),), output=str(tmp_path / "out")
    )
    with pytest.raises(ConfigError, match="both labels"):
        evaluate(config)


def test_the_text_has_every_variant_every_cell_and_the_asked_alpha(result: EvaluationFigures) -> None:
    printed = text(result)
    for words in (
        "== as found: 120 natural, 60 generated",
        "== format aligned",
        "== recompressed",
        "flow against knn: higher, difference +",
        "flow against mlp_probe: no difference beyond the noise",
        "JPEG: 100 natural, 56 generated; AUROC 0.",
        "WEBP: 0 natural, 4 generated; no AUROC with fewer than 10 images of a class",
        "below 512 pixels: 40 natural, 20 generated",
        "recall at 0.1",
        "at alpha 0.1: recall",
    ):
        assert words in printed
    assert "beat" not in printed and "0.05:" not in printed


def test_the_page_has_every_variant_and_every_cell(result: EvaluationFigures, tmp_path: Path) -> None:
    config = EvaluateConfig(output=str(tmp_path), gallery=0)
    write_page(config, Run(Place.at(tmp_path)), score_table(), result, ImageLimits())
    page = (tmp_path / "report.html").read_text()
    for words in (
        "AUROC recompressed",
        "AUROC format-aligned",
        "no difference beyond the noise from",
        "higher than knn",
    ):
        assert words in page
    assert "beat" not in page
    cells = page[page.index("File formats, as found") : page.index("Generators, worst first")]
    for name in ("JPEG", "PNG", "WEBP", "below 512 pixels", "512 to 1023 pixels"):
        assert f">{name}</td>" in cells
    assert cells.count("too few</td>") == 4  # AUROC and interval of PNG and of WEBP


@pytest.mark.parametrize("command", ["audit", "train", "evaluate"])
def test_audit_train_and_evaluate_take_the_same_input_options(command: str) -> None:
    help_text = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
    for flag in ("--input-format", "--group-by", "--uri-column", "--bytes-column", "--group-column"):
        assert flag in help_text
