"""Draw examples of the proxies and their mean radial spectra as one PNG."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from clipflow_ray import proxies, sandbox
from clipflow_ray.config import OPENAI_VIEW, ImageLimits, InventoryOptions, ProxyConfig
from clipflow_ray.errors import InputError, ItemError
from clipflow_ray.images import Pixels, by_size
from clipflow_ray.inputs.listing import rows
from clipflow_ray.inputs.reading import read_row
from clipflow_ray.place import Place

_EXAMPLES = 4


def draw(inputs: Sequence[str], path: str, config: ProxyConfig, count: int = 16) -> int:
    """Write a PNG to the local `path` from up to `count` readable images, and return the number of images used.

    Left: one example of each family on each of up to four images. Right: mean log amplitude over radius, each family
    minus the naturals. Raises InputError if no image is readable.
    """
    proxies.check(config)
    views = _views(inputs, count)
    names = [proxies.NATURAL, *config.families]
    made = {name: [_made(view, name, at, config) for at, view in enumerate(views)] for name in names}
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(_EXAMPLES, len(views))
    figure = plt.figure(figsize=(2 * columns + 9, 2 * len(names)), constrained_layout=True)
    grid = figure.add_gridspec(len(names), columns + 4)
    for row, name in enumerate(names):
        for column in range(columns):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(made[name][column])
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(name.replace("_", "\n"))
    axes = figure.add_subplot(grid[:, columns:])
    natural = _mean_profile(made[proxies.NATURAL])
    radius = np.linspace(0, 1, len(natural))
    shades = plt.get_cmap("tab20")
    for at, name in enumerate(config.families):
        profile, dashes = _mean_profile(made[name]) - natural, ("-", "--")[at // shades.N % 2]
        axes.plot(radius, profile, color=shades(at % shades.N), linestyle=dashes, label=name.replace("_", " "))
    axes.axhline(0.0, color="black", linewidth=0.8, label="natural")
    axes.set_xlabel("radial frequency / Nyquist")
    axes.set_ylabel("mean log amplitude minus that of naturals (nats)")
    axes.set_title(f"Mean radial spectra of {len(views)} images")
    axes.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return len(views)


def radial_profile(view: Pixels) -> NDArray[np.float64]:
    """Mean log amplitude (natural log) of the grey view in rings of one frequency bin, DC to Nyquist: [H / 2 + 1]."""
    size = view.shape[0]
    amplitude = np.log(np.abs(np.fft.fft2(view.mean(axis=2))) + 1e-3)
    frequency = np.fft.fftfreq(size) * size
    ring = np.rint(np.hypot(frequency[:, None], frequency[None, :])).astype(int)
    total = np.bincount(ring.ravel(), amplitude.ravel())
    profile: NDArray[np.float64] = (total / np.bincount(ring.ravel()))[: size // 2 + 1]
    return profile


def _mean_profile(views: list[Pixels]) -> NDArray[Any]:
    return np.asarray(np.mean([radial_profile(view) for view in views], axis=0))


def _made(view: Pixels, name: str, at: int, config: ProxyConfig) -> Pixels:
    if name == proxies.NATURAL:
        return proxies.natural(view)
    return proxies.proxy(view, name, proxies.generator(config.seed, name, at), config)


def _views(inputs: Sequence[str], count: int) -> list[Pixels]:
    limits, options = ImageLimits(), InventoryOptions()
    found = [Place.at(uri) for uri in inputs]

    def readable() -> Any:
        for row in rows(found, options):
            try:
                views = sandbox.decode(read_row(row, found[0], options, limits), limits, OPENAI_VIEW).rgb
                yield by_size(views[None], OPENAI_VIEW.sizes)[0][0]
            except ItemError:
                continue  # the picture needs only some of the images

    views = list(islice(readable(), count))
    if not views:
        raise InputError(f"No readable image under {', '.join(inputs)}.")
    return views
