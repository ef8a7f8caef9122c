"""What an input comes to, without Ray and without an encoder: listed, read and decoded as an audit does."""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipflow_ray.columns import manifest_table
from clipflow_ray.config import ImageLimits, InventoryOptions
from clipflow_ray.data.reading import described, read_images
from clipflow_ray.inputs.listing import rows
from clipflow_ray.place import Place
from tests.conftest import encoded, photo

PICTURES = tuple(encoded(photo(at, (48, 64))) for at in range(4))
NAMES = tuple(f"p{at}.jpg" for at in range(4))
BESIDE = tuple(zip(NAMES, PICTURES, strict=True))  # name and content of four pictures


def account(*inputs: Path | str | Place, **options: Any) -> list[dict[str, Any]]:
    """The described rows of the inputs, in the order of their listing."""
    places = [each if isinstance(each, Place) else Place.at(each) for each in inputs]
    settings = InventoryOptions(**options)
    table = manifest_table(list(rows(places, settings)))
    outcomes = read_images(table, places[0], ImageLimits(), options=settings)
    found: list[dict[str, Any]] = described(table, outcomes, [None] * len(table)).to_pylist()
    assert len({row["row_id"] for row in found}) == len(found)
    return found


def counts(found: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The number of rows by status."""
    return dict(Counter(row["status"] for row in found))


def codes(found: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The number of error rows by code."""
    return dict(Counter(row["error_code"] for row in found if row["error_code"]))


def write(folder: Path, files: Sequence[tuple[str, bytes]] = BESIDE) -> Path:
    """Write files below a folder, and return the folder."""
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar(path: Path, members: Sequence[tuple[str, bytes]] = BESIDE, mode: str = "w") -> Path:
    """Write a tar file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
