"""What archives share: a row for each member, whatever the kind of the archive."""

from dataclasses import dataclass, field

from clipflow_ray.config import InventoryOptions
from clipflow_ray.inputs.format import Row, Source, group_of, manifest_row, no_image, row_id
from clipflow_ray.recognise import no_image_by_name


@dataclass
class Members:
    """Makes the rows of an archive's members. A name may occur several times, and each occurrence is a row."""

    source: Source
    options: InventoryOptions
    _repeats: dict[str, int] = field(default_factory=dict)

    def row(self, name: str, offset: int | None, size: int | None, problem: str | None = None) -> Row:
        """The row of a member, found again by `offset`. A member that is no image by its name keeps its row."""
        count = self._repeats.get(name, 0)
        self._repeats[name] = count + 1
        uri = self.source.place.uri
        reason = no_image_by_name(name)
        return manifest_row(
            self.source,
            uri,
            group_of(self.source.base, uri, self.options.group_depth),
            name,
            row_id(uri, name + (f"#{count}" if count else "")),
            offset=offset,
            bytes=size,
            etag=self.source.etag,
            problem=problem or (no_image(reason) if reason else None),
        )
