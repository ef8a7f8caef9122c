"""Input format `hf`: an imagefolder of Hugging Face, that is image files with their labels.

The labels stand in `metadata.csv` or `metadata.jsonl`. Without metadata, the last folder of a file is its label.
"""

from collections.abc import Iterator
from typing import Any, Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import InputFormat, Row, Source, file_row, stated
from clipflow_ray.inputs.lists import records
from clipflow_ray.place import Place, StoredObject

_METADATA: Final = ("metadata.csv", "metadata.jsonl")


class Imagefolder(InputFormat):
    """Image files, and metadata files that describe them by the column `file_name`."""

    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.place.name.lower() in _METADATA

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        items = [*source.place.objects()]
        metadata: dict[str, dict[str, Any]] = {}
        for item in items:
            if item.place.name in _METADATA:
                folder = item.uri.rpartition("/")[0].rstrip("/")
                for record in records(item.place, "file_name"):
                    if not record.get("file_name"):
                        raise InputError(f"{item.uri} has no column file_name; that is what an imagefolder needs.")
                    metadata[f"{folder}/{record['file_name']}"] = record
        for item in items:
            if item.place.name not in _METADATA:
                row = file_row(source, item, options)
                folders = item.uri.removeprefix(source.place.uri).strip("/").split("/")[:-1]
                row["label"] = folders[-1] if len(folders) > 1 or (folders and not metadata) else None
                yield row | stated(metadata.get(item.uri, {}), options)
