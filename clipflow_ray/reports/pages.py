"""Shared parts of the HTML reports: the base template with style and sorting, charts as inline SVG, thumbnails.

A report is one file that loads nothing from the network, so it also works offline.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from clipflow_ray import sandbox
from clipflow_ray.config import ImageLimits, InventoryOptions
from clipflow_ray.errors import ItemError
from clipflow_ray.inputs.reading import read_bytes
from clipflow_ray.runs.folder import MANIFEST, Run

NATURAL_COLOUR, SUSPICIOUS_COLOUR, GREY = "#8aa4c8", "#d1495b", "#808080"
_THUMBNAIL: Final = 192
_STYLE: Final = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "svg.hashsalt": "clipflow",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}


def environment(package: str) -> Environment:
    """Return a Jinja environment for the templates of `package`, which may extend `page.html.j2`."""
    result = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("clipflow_ray.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters |= {"percent": percent, "interval": interval, "number": "{:,}".format}
    return result


def chart(draw: Callable[[Any], None], size: tuple[float, float] = (6.4, 3.0), rows: int = 1) -> str:
    """Return a chart as inline SVG; `size` is in inches.

    `draw` gets the axes, or an array of axes if there are several rows. Grey text is legible on light and on dark.
    """
    import matplotlib  # imported here: it takes a second, which a command should not wait for at its start

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    style: Any = _STYLE
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, figsize=size, sharex=True, constrained_layout=True)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = out.getvalue()
    # Every chart has the same group ids, but an id must be unique in a page. Nothing refers to them, so drop them.
    return re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :])


def p_value_chart(counts: Sequence[int]) -> str:
    """Return a histogram of p-values in equal bins from 0 to 1, as inline SVG."""

    def draw(axes: Any) -> None:
        shares = np.array(counts, float) / max(1, sum(counts))
        axes.stairs(shares, np.linspace(0, 1, len(counts) + 1), fill=True, color=SUSPICIOUS_COLOUR)
        axes.axhline(1.0 / len(counts), color=GREY, linestyle="--", linewidth=1)
        axes.set_xlabel("p-value (dashed: expected of photographs like the calibration's)")
        axes.set_ylabel("share of images")

    return chart(draw)


@dataclass(frozen=True)
class Picture:
    """One image of a gallery. `note` is a caption; `image` is a thumbnail as a data URI, or None."""

    row_id: str
    uri: str
    member: str | None
    score: float
    p_value: float
    note: str
    image: str | None = None

    @property
    def name(self) -> str:
        """Name of the image within its container, or its URI."""
        return self.member or self.uri


def pictured(
    run: Run, wanted: Sequence[Picture], limits: ImageLimits, options: InventoryOptions | None = None
) -> list[Picture]:
    """Return the pictures with thumbnails. The inputs are read again; `options` are those of their listing."""
    ids = [picture.row_id for picture in wanted]
    found = pads.field("row_id").isin(ids)
    # one file at a time, because manifest files are large
    listed = [part.to_table(filter=found, batch_readahead=1, fragment_readahead=1) for part in run.parts(MANIFEST)]
    manifest = pa.concat_tables(listed)
    contents = dict(zip(manifest["row_id"].to_pylist(), read_bytes(manifest, run.place, limits, options), strict=True))
    return [replace(each, image=_thumbnail(contents.get(each.row_id), limits)) for each in wanted]


def percent(value: float | None) -> str:
    """Format a share as a percentage, and None as `none`."""
    return "none" if value is None else f"{100 * value:.2f} %"


def interval(values: Iterable[float] | None) -> str:
    """Format both ends of an interval of shares, and None as `none`."""
    return "none" if values is None else " to ".join(percent(value) for value in values)


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
