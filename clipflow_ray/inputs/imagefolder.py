"""Input format `hf`: an imagefolder of Hugging Face, that is image files with their labels.

The labels stand in `metadata.csv`, `metadata.jsonl` or `metadata.parquet`. Without metadata, the last folder of a file
is its label, unless it is the name of a split, such as `train`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import (
    InputFormat,
    Row,
    Source,
    file_row,
    group_of,
    manifest_row,
    resolved,
    stated,
    unlisted,
)
from clipflow_ray.inputs.images import Containers, absent, is_metadata, items
from clipflow_ray.inputs.lists import records
from clipflow_ray.inputs.parquet import table_records
from clipflow_ray.place import Place

_FILE_NAME: Final = "file_name"
_SPLIT: Final = re.compile(
    r"(train|training|valid|validation|dev|val|test|testing|eval|evaluation)([-._ 0-9].*)?", re.I
)


class Imagefolder(InputFormat):
    """Image files, and metadata files that describe them by the column `file_name`."""

    any_file = True

    def matches(self, head: bytes, compression: str | None) -> bool:
        return False  # the names of a folder's files show it, not the content of one file

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row | Source]:
        """One row for each file, and for each file that the metadata name."""
        listed = list(items(source, options, left_out))
        described: dict[str, dict[str, Any]] = {}
        metadata = [item for item in listed if is_metadata(item)]
        for item in metadata:
            try:
                described |= _described(item.place, options)
            except InputError as error:
                yield unlisted(Source(self.name, item.place, source.base), options, f"gives no labels: {error}")
        names = {item.uri for item in metadata}
        found = Containers(source)
        for item in listed:
            if item.uri in names:
                continue
            if opened := found.of(item):
                yield opened
                continue
            row = file_row(source, item, options)
            folders = item.uri.removeprefix(source.base.uri).strip("/").split("/")[:-1]
            if folders and not _SPLIT.fullmatch(folders[-1]) and (len(folders) > 1 or not metadata):
                row["label"] = folders[-1]
            yield row | described.pop(item.uri, {})
        for uri, values in described.items():  # the metadata name files that are not there
            yield manifest_row(source, uri, group_of(source.base, uri, options.group_depth)) | values
        yield from absent(source, options)


def _described(place: Place, options: InventoryOptions) -> dict[str, dict[str, Any]]:
    """URI -> values of the manifest. Raises InputError if the metadata cannot be read or have no `file_name`."""
    folder = place.uri.rpartition("/")[0] + "/"
    found: dict[str, dict[str, Any]] = {}
    named = options.model_copy(update={"uri_column": _FILE_NAME})
    is_table = place.name.lower().endswith(".parquet")
    for record in table_records(place, named, "") if is_table else records(place, named, advice=""):
        name = str(record.values.get(_FILE_NAME) or "").strip()
        if name:
            found[resolved(folder, name)] = stated(record.values, options)
    return found
