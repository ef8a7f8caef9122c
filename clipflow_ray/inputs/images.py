"""Input format `images`: the files of a folder or prefix, or one file.

Every file gets a row. A file that is no image by its name is not read; one whose name says nothing is judged by its
first bytes.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import (
    InputFormat,
    Row,
    Source,
    file_row,
    formats,
    group_of,
    manifest_row,
    no_image,
)
from clipflow_ray.inputs.patterns import fits_any
from clipflow_ray.place import StoredObject
from clipflow_ray.recognise import picture_kind

_METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class Images(InputFormat):
    """Image files. With `--input-format images`, archives and tables among them are not opened."""

    any_file = True

    def matches(self, head: bytes, compression: str | None) -> bool:
        return compression is None and picture_kind(head) is not None

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row | Source]:
        found = Containers(source) if source.is_folder else None
        for item in items(source, options, left_out):
            opened = found and found.of(item)
            if opened and options.input_format != "images":
                yield opened
                continue
            row = file_row(source, item, options)
            if opened:
                reason = f"It is no image file; --input-format auto reads it as {opened.input_format}."
                row["problem"] = no_image(reason)
            elif source.is_folder and is_metadata(item) and options.input_format == "auto":
                left_out["metadata files far behind in the listing; --input-format hf reads their labels"] += 1
            yield row
        yield from absent(source, options)


class Containers:
    """The files of a folder that hold images, by their names."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kinds = [(each.suffixes, each.name) for each in formats() if each.suffixes and each.in_folders]

    def of(self, item: StoredObject) -> Source | None:
        """The source that the object is, or None if its name is not that of a file that holds images."""
        uri = item.uri.lower()
        name = next((name for suffixes, name in self._kinds if uri.endswith(suffixes)), None)
        return Source(name, item.place, self._source.base, etag=item.etag) if name else None


def is_metadata(item: StoredObject) -> bool:
    """Whether the object's name is that of the metadata of an imagefolder of Hugging Face."""
    return item.place.name.lower() in _METADATA


def items(source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[StoredObject]:
    """The objects of a source that its selection, `--include` and `--exclude` keep.

    Raises InputError if an input as a whole has no object, or none that its pattern fits.
    """
    chosen, some = source.selected, False
    enters = chosen.enters if chosen else None
    for item in source.place.objects(source.place == source.base, enters, left_out):
        if chosen and not chosen.keeps(item.uri):
            continue  # a pattern of --input names what is wanted, so nothing is left out
        some = True
        below = item.uri.removeprefix(source.base.uri).lstrip("/") or item.place.name
        if options.include and not fits_any(options.include, below) and not is_metadata(item):
            left_out["files that no --include fits"] += 1
        elif options.exclude and fits_any(options.exclude, below):
            left_out["files that an --exclude fits"] += 1
        else:
            yield item
    if chosen and not some:
        named = ", ".join((*chosen.patterns, *sorted(chosen.names)))
        raise InputError(f"There is nothing that {named} fits.")


def absent(source: Source, options: InventoryOptions) -> Iterator[Row]:
    """A row for each name that the pattern of an input spells out and that is not there."""
    if source.selected is None or not source.selected.names:
        return
    there = {source.selected.named(item.uri) for item in source.place.objects(required=False)}
    for name in sorted(source.selected.names - there):
        yield manifest_row(source, name, group_of(source.base, name, options.group_depth))
