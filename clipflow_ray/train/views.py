"""Ray Data task of training: makes the natural views of an image and their proxies. Does not import torch."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from clipflow_ray import images, proxies
from clipflow_ray.config import ImageLimits, InventoryOptions, ProxyConfig, Segment, ViewSpec, slots
from clipflow_ray.data.reading import described, read_images
from clipflow_ray.images import DecodedImage, Pixels
from clipflow_ray.place import Place
from clipflow_ray.train.parts import Parts

_SUBSAMPLINGS = ("4:4:4", "4:2:0")


def read_and_distort(
    table: pa.Table,
    near: Place,
    limits: ImageLimits,
    spec: ViewSpec,
    segments: Sequence[Segment],
    config: ProxyConfig,
    parts: Parts,
    options: InventoryOptions,
) -> pa.Table:
    """Manifest rows -> described rows with `view` (bytes of M images) and `families` (the family of each of them).

    M is `natural_views * (1 + proxies_per_view)`. Each of the M images has the views of `slots(segments)`. Images of
    the calibration part give one image, plain in all views: the one that inference uses. An unreadable image keeps its
    row and gives none. An image of no part keeps its row and is not read.
    """
    ids = table["row_id"].to_pylist()
    part_of = parts.of(ids, table["group"].to_pylist())
    outcomes = read_images(table, near, limits, options=options, chosen=part_of != "unused")
    views: list[bytes] = []
    families: list[list[str]] = []
    for identity, part, outcome in zip(ids, part_of, outcomes, strict=True):
        made: list[tuple[str, Pixels]] = []
        if isinstance(outcome.image, DecodedImage):
            if part == "calibration":
                rgb = outcome.image.rgb
                plain = [proxies.natural(images.view(rgb, spec, size)).reshape(-1) for size, _ in slots(segments)]
                made = [(proxies.NATURAL, np.concatenate(plain))]
            else:
                made = distorted(outcome.image.rgb, identity, spec, segments, config)
        views.append(b"".join(view.tobytes() for _, view in made))
        families.append([family for family, _ in made])
    table = described(table, outcomes, views)
    return table.append_column("families", pa.array(families, pa.list_(pa.string())))


def distorted(
    rgb: Pixels, row_id: str, spec: ViewSpec, segments: Sequence[Segment], config: ProxyConfig
) -> list[tuple[str, Pixels]]:
    """Return (family, views) pairs of one image: each natural view, then its proxies; views are uint8 [bytes].

    The views are those of `slots(segments)`, one after the other. Views of different sizes have the same family. A
    `paired` view is the plain one after JPEG compression, with one quality for a natural view and its proxies. The
    random draws depend on `config.seed` and `row_id` alone.
    """
    names = sorted(config.families)
    made: list[tuple[str, Pixels]] = []
    for number in range(config.natural_views):
        rng = proxies.generator(config.seed, row_id, number)
        count = config.proxies_per_view
        chosen = rng.choice(names, size=count, replace=count > len(names))
        labels = [proxies.NATURAL, *(proxies.label(str(name), rng, config) for name in chosen)]
        low, high = config.paired_quality
        quality, subsampling = int(rng.integers(low, high + 1)), str(rng.choice(_SUBSAMPLINGS))
        plain: dict[int, list[Pixels]] = {}
        for size in spec.sizes:
            draws = proxies.generator(config.seed, row_id, number, size)
            view = images.view(rgb, spec, size) if number == 0 else proxies.augmented(rgb, draws, size)
            plain[size] = [proxies.natural(view), *(proxies.drawn(view, each, draws, config) for each in labels[1:])]
        for at, family in enumerate(labels):
            views = [
                plain[size][at] if training == "plain" else compressed(plain[size][at], quality, subsampling)
                for size, training in slots(segments)
            ]
            made.append((family, np.concatenate([view.reshape(-1) for view in views])))
    return made


def compressed(view: Pixels, quality: int, subsampling: str) -> Pixels:
    """uint8 [S, S, 3] after JPEG compression of `quality` (IJG scale) and chroma `subsampling`."""
    out = io.BytesIO()
    Image.fromarray(view).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return np.array(Image.open(out))
