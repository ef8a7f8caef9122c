"""What an input format must do, and what the formats share: manifest rows, identities, groups and sources."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, cast

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place, StoredObject

Row = dict[str, Any]
IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif")


@dataclass(frozen=True)
class Source:
    """A part of an input that one task lists: a folder, a prefix or a file.

    `base` is the input that the source belongs to; groups are folders below it. `etag` is that of a file on s3.
    """

    input_format: str
    place: Place
    base: Place
    etag: str | None = None


@dataclass(frozen=True)
class InputFormat(ABC):
    """An input format: how it is recognized, how its images are listed, and how one image is read.

    `name` is the format's name in the registry. A row is read by the format that listed it.
    """

    name: str

    @abstractmethod
    def matches(self, place: Place, item: StoredObject) -> bool:
        """Whether the input `place` has this format, judged by the name of one object in it.

        The objects of an input are tried in the order of their listing until one of them matches a format.
        """

    def sources(self, place: Place) -> Sequence[Source]:
        """The parts of the input that are listed at the same time. By default the input as a whole.

        Raises InputError if the input holds nothing that this format can list.
        """
        return (Source(self.name, place, place),)

    @abstractmethod
    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        """One manifest row for each image of the source, as a stream; `manifest_row` makes one.

        Raises InputError if the source cannot be listed.
        """

    def read(self, place: Place, row: Row, options: InventoryOptions, max_bytes: int) -> bytes:
        """The encoded image of a manifest row; `place` is the place of its URI. By default the object as a whole.

        The row's `uri`, `member`, `offset`, `bytes` and `etag` are as `list` set them. Raises ReadError.
        """
        return place.read(max_bytes, row["etag"])


def format_named(name: str) -> InputFormat:
    """The format of that name in the registry."""
    module, _, kind = FORMATS[name].partition(":")
    return cast(InputFormat, getattr(import_module(module), kind)(name))


def manifest_row(
    source: Source, uri: str, group: str, member: str = "", identity: str | None = None, **values: Any
) -> Row:
    """A manifest row with `values` for further columns; columns that are not named are null.

    By default the row's id is that of the object `uri` and its `member`. `identity` replaces it if a source may name
    the same object twice.
    """
    row: Row = {
        "row_id": identity or row_id(uri, member),
        "uri": uri,
        "member": member,
        "input_format": source.input_format,
        "offset": None,
        "group": group,
        "bytes": None,
        "etag": None,
        "label": None,
        "generator": None,
    }
    return row | values


def file_row(source: Source, item: StoredObject, options: InventoryOptions) -> Row:
    """The manifest row of an object that is one image. Raises InputError if its name is not UTF-8."""
    try:
        item.uri.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{item.uri!a} is not a UTF-8 name: rename it.") from error
    group = group_of(source.base, item.uri, options.group_depth)
    return manifest_row(source, item.uri, group, bytes=item.bytes, etag=item.etag)


def row_id(uri: str, member: str = "") -> str:
    """32 hex digits that identify an object. They are the same in every run, and a resumed run goes by them."""
    return hashlib.blake2b(f"{uri}\0{member}".encode(errors="surrogateescape"), digest_size=16).hexdigest()


def group_of(base: Place, uri: str, depth: int) -> str:
    """The first `depth` folders of `uri` below `base`, or the name of `base` if there are none."""
    folders = uri.removeprefix(base.uri).lstrip("/").split("/")[:-1][:depth]
    return "/".join(folders) or base.name


def value_columns(options: InventoryOptions) -> dict[str, str]:
    """Columns of the manifest that a list or a table may fill -> the user's names for them."""
    return {"group": options.group_column, "label": options.label_column, "generator": options.generator_column}


def stated(record: Mapping[str, Any], options: InventoryOptions) -> dict[str, str]:
    """The group, label and generator that a record of a list or a table states."""
    named = ((name, record.get(column)) for name, column in value_columns(options).items())
    return {name: str(value) for name, value in named if value not in (None, "")}


def files_ending(name: str, place: Place, suffix: str) -> Sequence[Source]:
    """One source for each file of the input whose name ends in `suffix`. Raises InputError if there is none."""
    files = [Source(name, item.place, place, item.etag) for item in place.objects() if item.uri.endswith(suffix)]
    if not files:
        raise InputError(f"{place.uri} holds no {suffix} file; give --input-format what it is.")
    return files
