from collections import Counter

import numpy as np

from clipflow_ray.config import ImageLimits
from clipflow_ray.demo import objects, photographs
from clipflow_ray.errors import ImageError
from clipflow_ray.images import decode


def test_the_demo_has_a_dozen_photographs_from_packages_and_about_eighty_objects() -> None:
    photos = dict(photographs())
    assert len(photos) >= 12 and all(photo.ndim == 3 and photo.dtype == np.uint8 for photo in photos.values())
    counts = Counter(key.split("/")[0] for key, _ in objects())
    assert counts["photographs"] == len(photos)
    assert counts["crops"] == counts["edited"] == 2 * len(photos)
    assert 70 <= sum(counts.values()) <= 90


def test_the_demo_has_the_same_objects_every_time_and_only_its_broken_files_are_refused() -> None:
    first, second = dict(objects()), dict(objects())
    assert first == second
    refused = {}
    for key, data in first.items():
        try:
            decode(data, ImageLimits())
        except ImageError as error:
            refused[key] = error.item_code
    assert refused == {
        "broken/truncated.jpg": "truncated",
        "broken/empty.png": "empty",
        "broken/text.jpg": "unsupported_format",
    }


def test_each_edited_image_differs_from_its_crop_and_has_its_size() -> None:
    made = dict(objects())
    for key in made:
        if key.startswith("edited/"):
            twin, crop = (decode(made[k], ImageLimits()).rgb for k in (key, key.replace("edited/", "crops/")))
            assert twin.shape == crop.shape
            assert np.abs(twin.astype(int) - crop).mean() > 1
