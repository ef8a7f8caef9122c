"""List inputs of any format: their sources, their manifest rows, and a hash of the listing."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import InputFormat, Row, Source, format_named
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place


def sources(inputs: Sequence[Place], options: InventoryOptions) -> list[Source]:
    """The parts of the inputs, to be listed at the same time. An input that lies inside another one is left out.

    Raises InputError if an input holds nothing.
    """
    roots = sorted(set(inputs), key=lambda place: place.uri)
    roots = [place for place in roots if not any(other.holds(place) for other in roots if other != place)]
    wanted = options.input_format
    formats = [_detected(place) if wanted == "auto" else format_named(wanted) for place in roots]
    return [source for found, place in zip(formats, roots, strict=True) for source in found.sources(place)]


def rows_of(source: Source, options: InventoryOptions) -> Iterator[Row]:
    """The manifest rows of one source, as a stream. Raises InputError if the source cannot be listed."""
    return format_named(source.input_format).list(source, options)


def rows(inputs: Sequence[Place], options: InventoryOptions) -> Iterator[Row]:
    """The manifest rows of all inputs, as a stream, listed in this process."""
    return (row for source in sources(inputs, options) for row in rows_of(source, options))


def listing_hash(listed: Iterable[Row]) -> str:
    """16 hex digits over the ids, sizes and ETags of manifest rows."""
    digest = hashlib.sha256()
    for row in listed:
        digest.update(f"{row['row_id']} {row['bytes']} {row['etag']}\n".encode())
    return digest.hexdigest()[:16]


def check_apart(inputs: Sequence[Place], folder: Place) -> None:
    """Raise InputError if `folder`, which is to be written, lies inside an input."""
    for place in inputs:
        if place.holds(folder / ""):
            raise InputError(f"The output lies inside the input {place.uri}; write it elsewhere.")


def _detected(place: Place) -> InputFormat:
    """The format of the first object that matches one, or `images` if no object matches any."""
    formats = [format_named(name) for name in FORMATS]
    for item in place.objects():
        for found in formats:
            if found.matches(place, item):
                return found
    return format_named("images")
