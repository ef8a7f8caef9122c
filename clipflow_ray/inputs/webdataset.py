"""Input format `webdataset`: uncompressed tar files with images inside."""

import tarfile
from collections.abc import Iterator, Sequence

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import (
    IMAGE_SUFFIXES,
    InputFormat,
    Row,
    Source,
    files_ending,
    group_of,
    manifest_row,
    row_id,
)
from clipflow_ray.place import Place, StoredObject

_SUFFIX = ".tar"


class Webdataset(InputFormat):
    """Tar shards. A row names an image by its offset and size in the shard, so that one range request reads it."""

    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.uri.lower().endswith(_SUFFIX)

    def sources(self, place: Place) -> Sequence[Source]:
        return files_ending(self.name, place, _SUFFIX)

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        """The image members of a shard. Only the headers are read."""
        uri = source.place.uri
        group = group_of(source.base, uri, options.group_depth)
        repeats: dict[str, int] = {}
        try:
            with source.place.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                        repeats[member.name] = repeats.get(member.name, -1) + 1
                        again = f"#{repeats[member.name]}" if repeats[member.name] else ""
                        yield manifest_row(
                            source,
                            uri,
                            group,
                            member.name,
                            row_id(uri, member.name + again),
                            offset=member.offset_data,
                            bytes=member.size,
                            etag=source.etag,
                        )
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{uri} does not read as an uncompressed tar: {error}.") from error

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        return place.read(max_bytes, row["etag"], (row["offset"], row["bytes"]))
