"""The report of an audit: one self-contained HTML page, and the same facts as markdown and json.

Everything in it is derived from the ledger, `run.json` and the checkpoint's calibration; thumbnails are read from the
input again, small and few.
"""

import base64
import io
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from scipy import stats

from clipflow_ray import sandbox
from clipflow_ray.audit.distribution import Distribution
from clipflow_ray.audit.ledger import LEDGER, SCHEMA, flagged
from clipflow_ray.config import DISCLAIMER, AuditConfig, ImageLimits
from clipflow_ray.data.reading import read_bytes
from clipflow_ray.data.resumable import MANIFEST, Run
from clipflow_ray.errors import ItemError
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.storage import write_text

_THUMBNAIL: Final = 192
_EXAMPLES: Final = 3
_MAX_GROUPS: Final = 200
_FDR: Final = 0.05
_OK: Final = pc.field("status") == "ok"
_ONE_BY_ONE: Final = {"batch_readahead": 1, "fragment_readahead": 1}  # files of a manifest are large
_FLAGS: Final = (
    *("input_format", "group_by", "uri_column", "bytes_column", "group_column", "label_column"),
    *("sample", "dedupe", "max_error_rate", "gallery", "endpoint_url", "region", "unsigned"),
)


def write_report(run: Run, record: dict[str, Any], calibration: Calibration, gallery: int, column: str | None) -> str:
    """Write `report.html`, `report.md` and `report.json` into the run's folder; returns the page's URI."""
    facts = facts_of(run, record, calibration)
    pictures = _gallery(run, gallery, column) if gallery else {}
    environment = Environment(
        loader=PackageLoader("clipflow_ray.audit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "number": "{:,}".format}
    write_text(run.path("report.json"), json.dumps(facts, indent=1) + "\n", run.s3)
    for name in ("report.md", "report.html"):
        charts = _charts(facts) if name.endswith("html") else {}
        text = environment.get_template(f"{name}.j2").render(**facts, charts=charts, gallery=pictures)
        write_text(run.path(name), text, run.s3)
    return run.path("report.html")


def facts_of(run: Run, record: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """All that the report says, as plain json values."""
    alpha = float(record["alpha"])
    counts: Counter[tuple[str, str, str, str]] = Counter()
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    columns = ["group", "stratum", "status", "verdict", "error_code", "error_message", "uri", "member"]
    for batch in _batches(run, columns):
        rows = batch.to_pydict()
        keys = (rows[name] for name in ("group", "stratum", "status", "verdict"))
        counts.update((g or "", s or "", status, v or "") for g, s, status, v in zip(*keys, strict=True))
        for at, code in enumerate(rows["error_code"]):
            if code and len(examples[code]) < _EXAMPLES:
                place = rows["uri"][at] + (f" : {rows['member'][at]}" if rows["member"][at] else "")
                examples[code].append({"place": place, "message": rows["error_message"][at]})
    scores = Distribution(calibration.scores)
    for batch in _batches(run, ["score", "p_value"], _OK):
        scores.add(batch["score"].to_numpy(), batch["p_value"].to_numpy())
    config = record["config"]
    return {
        "disclaimer": DISCLAIMER,
        "card": {
            "input": record["identity"]["input"],
            "checkpoint": record["identity"]["model_id"],
            "calibration": record["identity"]["calibration_id"],
            "calibration_n": record["calibration"]["calibration_n"],
            "alpha": alpha,
            "false_positive_rate_95": record["calibration"]["false_positive_rate_95"],
            "tool_version": record["identity"]["tool_version"],
            "encoder": record["identity"]["encoder_fingerprint"],
            "sample": config["sample"],
            "dedupe": record["dedupe"],
        },
        "command": _command(config, alpha),
        "counts": {name: record[f"by_{name}"] for name in ("status", "verdict", "error_code")}
        | {"rows": record["rows"]},
        "timing": record.get("timing"),
        "flagged": record["flagged"],
        "groups": _rates(counts, 0, alpha),
        "strata": _rates(counts, 1, alpha),
        "errors": {
            code: {"count": record["by_error_code"][code], "examples": examples[code]} for code in sorted(examples)
        },
        "scores": scores.histogram(),
        "p_values": scores.p_values(),
        "drift": _drift(scores, calibration),
    }


def _batches(run: Run, columns: list[str], only: pc.Expression | None = None) -> Iterator[pa.RecordBatch]:
    for part in run.parts(LEDGER):
        yield from part.to_batches(columns=columns, filter=only)


def _rates(counts: Counter[tuple[str, str, str, str]], place: int, alpha: float) -> list[dict[str, Any]]:
    """Flagged share of each group or stratum, most flagged first; `marked` ones exceed alpha at an FDR of 5 %."""
    of: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for key, count in counts.items():
        if key[2] == "ok":
            of[key[place]] += count
            hits[key[place]] += count if key[3] == "likely_ai" else 0
    names = [name for name, _ in of.most_common(_MAX_GROUPS)]
    if not names:
        return []
    tests = [stats.binomtest(hits[name], of[name], alpha, "greater").pvalue for name in names]
    adjusted = stats.false_discovery_control(tests)
    table = [
        {"name": name, **flagged(hits[name], of[name], alpha), "q": float(q), "marked": bool(q <= _FDR)}
        for name, q in zip(names, adjusted, strict=True)
    ]
    return sorted(table, key=lambda row: (-row["share"], row["name"]))


def _drift(scores: Distribution, calibration: Calibration) -> dict[str, Any] | None:
    """Kolmogorov-Smirnov distance of the audit's scores from the calibration's, and both medians."""
    middle = scores.median()
    if middle is None:
        return None
    distance, p_value = scores.distance()
    return {
        "ks_distance": distance,
        "p_value": p_value,
        "median": middle,
        "calibration_median": float(np.median(calibration.scores)),
    }


def _gallery(run: Run, size: int, column: str | None) -> dict[str, list[dict[str, Any]]]:
    """Thumbnails as data URIs: the `size` most suspicious images, and as many unflagged ones by row id."""
    suspicious = _first(run, _OK, "score", "descending", size)
    # ids are hashes: their order is random and stable
    random = _first(run, _OK & (pc.field("verdict") != "likely_ai"), "row_id", "ascending", size)
    limits = ImageLimits(**(run.record() or {})["identity"]["limits"])
    wanted = [row["row_id"] for row in (*suspicious, *random)]
    listed = [part.to_table(filter=pc.field("row_id").isin(wanted), **_ONE_BY_ONE) for part in run.parts(MANIFEST)]
    manifest = pa.concat_tables(listed)
    contents = dict(zip(manifest["row_id"].to_pylist(), read_bytes(manifest, run.s3, limits, column), strict=True))

    def pictured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"image": _thumbnail(contents.get(row["row_id"]), limits)} for row in rows]

    return {"Most suspicious": pictured(suspicious), "Not flagged, at random": pictured(random)}


def _first(run: Run, only: pc.Expression, column: str, order: str, size: int) -> list[dict[str, Any]]:
    """The first `size` rows in that order; a batch at a time, for a ledger may be long."""
    columns = ["row_id", "uri", "member", "p_value", "score", "verdict"]
    best = pa.schema([SCHEMA.field(name) for name in columns]).empty_table()
    for batch in _batches(run, columns, only):
        best = pa.concat_tables([best, pa.Table.from_batches([batch])]).sort_by([(column, order)]).slice(0, size)
    result: list[dict[str, Any]] = best.to_pylist()
    return result


def _thumbnail(content: bytes | ItemError | None, limits: ImageLimits) -> str | None:
    if not isinstance(content, bytes):
        return None
    try:
        image = Image.fromarray(sandbox.decode(content, limits).rgb)
    except ItemError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _charts(facts: dict[str, Any]) -> dict[str, str]:
    """Inline SVG of the two histograms; grey text reads on light and on dark."""
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    style: Any = {
        name: "#808080" for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    result = {}
    with plt.rc_context(style | {"svg.hashsalt": "clipflow", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(6.4, 3.0), constrained_layout=True)
        edges = np.array(facts["scores"]["edges"])
        axes.stairs(facts["scores"]["calibration"], edges, fill=True, color="#8aa4c8", alpha=0.6, label="calibration")
        axes.stairs(facts["scores"]["audit"], edges, color="#d1495b", linewidth=2, label="this audit")
        axes.set_xlabel("score: negative log-likelihood per dimension (the ends hold what lies beyond)")
        axes.set_ylabel("share of images")
        axes.legend(frameon=False)
        result["scores"] = _svg(figure)
        figure, axes = plt.subplots(figsize=(6.4, 3.0), constrained_layout=True)
        counts = np.array(facts["p_values"], float)
        axes.stairs(counts / max(1.0, counts.sum()), np.linspace(0, 1, len(counts) + 1), fill=True, color="#d1495b")
        axes.axhline(1.0 / len(counts), color="#808080", linestyle="--", linewidth=1)
        axes.set_xlabel("p-value (dashed: what photographs like the calibration's give)")
        axes.set_ylabel("share of images")
        result["p_values"] = _svg(figure)
    return result


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _command(config: dict[str, Any], alpha: float) -> str:
    """The command line that repeats the audit, with every setting that has a flag and is not the default."""
    parts = ["clipflow-ray", "audit"]
    for uri in config["input"]:
        parts += ["--input", uri]
    parts += ["--output", config["output"], "--checkpoint", config["checkpoint"], "--alpha", f"{alpha:g}"]
    default = AuditConfig(output="").model_dump(mode="json")
    for here, there in ((config["inventory"], default["inventory"]), (config, default), (config["s3"], default["s3"])):
        for name in _FLAGS:
            if name in here and here[name] != there[name]:
                parts += [f"--{name.replace('_', '-')}", *([] if here[name] is True else [str(here[name])])]
    return shlex.join(parts)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f} %"


def _interval(values: Iterable[float] | None) -> str:
    return "none" if values is None else " to ".join(_percent(value) for value in values)
