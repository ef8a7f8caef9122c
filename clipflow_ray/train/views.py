"""Ray Data task of training: makes the natural views of an image and their proxies. Does not import torch."""

from collections.abc import Sequence

import pyarrow as pa

from clipflow_ray import images, proxies
from clipflow_ray.config import ImageLimits, InventoryOptions, ProxyConfig, ViewSpec
from clipflow_ray.data.reading import described, read_images
from clipflow_ray.images import DecodedImage, Pixels
from clipflow_ray.place import Place


def read_and_distort(
    table: pa.Table,
    near: Place,
    limits: ImageLimits,
    spec: ViewSpec,
    config: ProxyConfig,
    plain_groups: Sequence[str],
    options: InventoryOptions,
) -> pa.Table:
    """Manifest rows -> described rows with `view` (bytes of M views) and `families` (the family of each of them).

    M is `natural_views * (1 + proxies_per_view)`. Images of `plain_groups` are for calibration only, so they give
    one view: the one that inference uses. An unreadable image keeps its row and gives no view.
    """
    outcomes = read_images(table, near, limits, options=options)
    views: list[bytes] = []
    families: list[list[str]] = []
    for identity, group, outcome in zip(table["row_id"].to_pylist(), table["group"].to_pylist(), outcomes, strict=True):
        made: list[tuple[str, Pixels]] = []
        if isinstance(outcome.image, DecodedImage):
            plain = group in plain_groups
            made = distorted(outcome.image.rgb, identity, spec, config, plain)
        views.append(b"".join(view.tobytes() for _, view in made))
        families.append([family for family, _ in made])
    table = described(table, outcomes, views)
    return table.append_column("families", pa.array(families, pa.list_(pa.string())))


def distorted(
    rgb: Pixels, row_id: str, spec: ViewSpec, config: ProxyConfig, plain: bool = False
) -> list[tuple[str, Pixels]]:
    """Return the (family, view) pairs of one image: each natural view, then its proxies.

    The random draws depend on `config.seed` and `row_id` alone. `plain` gives one natural view and no proxies.
    """
    names = sorted(config.families)
    made: list[tuple[str, Pixels]] = []
    for number in range(1 if plain else config.natural_views):
        rng = proxies.generator(config.seed, row_id, number)
        view = images.view(rgb, spec) if number == 0 else proxies.augmented(rgb, rng, spec.size)
        made.append((proxies.NATURAL, proxies.natural(view)))
        if not plain:
            count = config.proxies_per_view
            chosen = rng.choice(names, size=count, replace=count > len(names))
            made += [proxies.drawn(view, str(name), rng, config) for name in chosen]
    return made
