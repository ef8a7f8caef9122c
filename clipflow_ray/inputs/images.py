"""Input format `images`: every object of a folder or prefix is an image, or one object is."""

from collections.abc import Iterator, Sequence

from clipflow_ray.config import InventoryOptions
from clipflow_ray.inputs.format import IMAGE_SUFFIXES, InputFormat, Row, Source, file_row
from clipflow_ray.place import Place, StoredObject


class Images(InputFormat):
    """Image files. Files with other names are listed as well, so that the ledger accounts for every object."""

    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.uri.lower().endswith(IMAGE_SUFFIXES)

    def sources(self, place: Place) -> Sequence[Source]:
        """A prefix on s3 is split by its first folders."""
        return [Source(self.name, part, place) for part in place.folders()]

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        whole = source.place == source.base
        return (file_row(source, item, options) for item in source.place.objects(required=whole))
