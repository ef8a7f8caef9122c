"""What an input format must do, and what the formats share: manifest rows, identities, groups and sources."""

import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Final, cast
from urllib.parse import unquote

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError, ItemCode
from clipflow_ray.inputs.patterns import Selection
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place, StoredObject
from clipflow_ray.recognise import no_image_by_name

Row = dict[str, Any]
NOT_AN_IMAGE: Final = "not_an_image"
_NOTHING: Final[Mapping[str, str]] = {}
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class MissingColumnError(InputError):
    """A list or a table lacks the column `column` that the user has named, or that must be there."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


class HoldsNoImagesError(InputError):
    """A file that may hold images holds none. In a folder, it is a file like any other."""


@dataclass(frozen=True)
class Source:
    """A part of an input that one task lists: a folder, a prefix or a file.

    `base` is the input that the source belongs to; groups are folders below it. `input_format` is `auto` if the first
    bytes of the file decide. `etag` is that of a file on s3. Of a folder, only the `selected` objects are listed.
    """

    input_format: str
    place: Place
    base: Place
    is_folder: bool = False
    etag: str | None = None
    selected: Selection | None = None


@dataclass(frozen=True)
class InputFormat(ABC):
    """An input format: how it is recognised, how its images are listed, and how one image is read.

    `name` is the format's name in the registry. A row is read by the format that listed it.

    `suffixes` are the endings of names, in lower case, by which files are taken for files of this format, and
    `in_folders` says whether those of a folder are. `any_file` says that the format lists files or members that may be
    no images. `in_order` says that the images of a file are read from its start to its end.
    """

    name: str
    suffixes: ClassVar[tuple[str, ...]] = ()
    in_folders: ClassVar[bool] = True
    any_file: ClassVar[bool] = False
    in_order: ClassVar[bool] = False

    @abstractmethod
    def matches(self, head: bytes, compression: str | None) -> bool:
        """Whether a file has this format: `head` are its first bytes, decompressed if it has a `compression`.

        The formats are asked in the order of the registry.
        """

    @abstractmethod
    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row | Source]:
        """One manifest row for each image of the source, as a stream; `manifest_row` makes one.

        A file in it that holds images is a source of its own. `left_out` counts what gets no row, by its reason. What
        cannot be listed gets a row with a `problem`. Raises InputError if the settings do not suit the source.
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


def formats() -> Sequence[InputFormat]:
    """All formats, in the order of the registry."""
    return [format_named(name) for name in FORMATS]


def manifest_row(
    source: Source, uri: str, group: str, member: str = "", identity: str | None = None, **values: Any
) -> Row:
    """A manifest row with `values` for further columns; columns that are not named are null.

    By default the row's id is that of the object `uri` and its `member`. `identity` replaces it if a source may name
    the same object twice. Bytes of a name that are not UTF-8 are written as escapes.
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
        "problem": None,
    }
    return {name: _printable(value) if isinstance(value, str) else value for name, value in (row | values).items()}


def problem(code: ItemCode, message: str) -> str:
    """The `problem` of a row that gets an error without being read."""
    return f"{code}: {message}"


def no_image(reason: str) -> str:
    """The `problem` of a row that is known to be no image."""
    return f"{NOT_AN_IMAGE}: {reason}"


def unlisted(source: Source, options: InventoryOptions, why: str) -> Row:
    """The row of a file that holds images but cannot be listed, or not to its end."""
    uri = source.place.uri
    group = group_of(source.base, uri, options.group_depth)
    message = problem("read_failed", f"{source.place.name} {why}")
    return manifest_row(source, uri, group, etag=source.etag, problem=message)


def file_row(source: Source, item: StoredObject, options: InventoryOptions) -> Row:
    """The manifest row of an object that may be one image."""
    group = group_of(source.base, item.uri, options.group_depth)
    reason = no_image_by_name(item.uri.removeprefix(source.base.uri))
    found = no_image(reason) if reason else None
    if not _is_utf8(item.uri):
        found = problem("bad_uri", f"{_printable(item.uri)} is not a UTF-8 name: rename it.")
    return manifest_row(source, item.uri, group, bytes=item.bytes, etag=item.etag, problem=found)


def row_id(uri: str, member: str = "") -> str:
    """32 hex digits that identify an object. They are the same in every run, and a resumed run goes by them."""
    return hashlib.blake2b(f"{uri}\0{member}".encode(errors="surrogatepass"), digest_size=16).hexdigest()


def group_of(base: Place, uri: str, depth: int) -> str:
    """The first `depth` folders of `uri` below `base`, or the name of `base` if there are none.

    A prefix on s3 that ends within a name belongs to the folder above it, so that groups are whole names.
    """
    below = uri.removeprefix(base.uri)
    if not base.is_local and not base.uri.endswith("/") and not below.startswith("/"):
        below = base.name + below
    folders = below.lstrip("/").split("/")[:-1][:depth]
    return "/".join(folders) or base.name


def resolved(folder: str, uri: str) -> str:
    """The URI that a list in `folder` means: `file://`, `~`, `..` and backslashes become a path or an s3 URI.

    A relative URI starts at `folder`, which ends with a slash. A URI with another scheme stays as it is.
    """
    if uri.startswith("file://"):
        host, slash, path = uri.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            return uri
        uri = unquote(slash + path)
    if not scheme_of(uri) and "\\" in uri and "/" not in uri and not _exists(folder, uri):
        uri = uri.replace("\\", "/")  # written on Windows
    if uri.startswith("~/"):
        uri = os.path.expanduser(uri)
    if not uri or (scheme_of(uri) and not uri.startswith("s3://")):
        return uri
    whole = uri if uri.startswith(("/", "s3://")) else folder + uri
    if not {".", ".."} & set(whole.split("/")):
        return whole
    root, slash, path = whole.partition("://") if whole.startswith("s3://") else ("", "", whole)
    kept: list[str] = []
    for part in path.split("/"):
        if part == ".." and len(kept) > 1:
            kept.pop()
        elif part not in (".", ".."):
            kept.append(part)
    return root + slash + "/".join(kept)


def scheme_of(uri: str) -> str:
    """The scheme of a URI, such as `https`; empty for a path."""
    found = _SCHEME.match(uri)
    return found[1] if found else ""


def not_read(uri: str, base64: bool = False) -> str | None:
    """Why a URI of a list cannot be read, in a sentence that says what can; None if it may be read."""
    if not uri:
        return "The cell of the URI is empty."
    if base64:
        return "The cell holds an image as base64 text, not a URI; write the images to files or to a column of bytes."
    scheme = scheme_of(uri)
    if scheme and scheme != "s3":
        return f"{scheme}:// is not read; only s3:// URIs and files of this machine are. Copy the images there."
    return None


def value_columns(options: InventoryOptions) -> dict[str, str]:
    """Columns of the manifest that a list or a table may fill -> the user's names for them."""
    return {"group": options.group_column, "label": options.label_column, "generator": options.generator_column}


def columns_found(
    names: Sequence[str], options: InventoryOptions, where: str, required: Mapping[str, str] = _NOTHING
) -> dict[str, str]:
    """The user's names of columns -> the names that `where` has for them. Case and outer spaces may differ.

    `required` are columns that must be there, each with what to do if it is not. Raises MissingColumnError if such a
    column, or one that the user has named, is not there.
    """
    defaults = value_columns(InventoryOptions()).values()
    advice = {column: f" Set --{name}-column." for name, column in value_columns(options).items()} | {**required}
    found = {}
    for wanted in advice:
        alike = [name for name in names if name.strip().casefold() == wanted.strip().casefold()]
        if wanted in names:
            found[wanted] = wanted
        elif len(alike) == 1:
            found[wanted] = alike[0]
        elif wanted in required or wanted not in defaults:
            there = ", ".join(names) or "none"
            raise MissingColumnError(f"{where} has no column {wanted!r}; it has {there}.{advice[wanted]}", wanted)
    return found


def stated(record: Mapping[str, Any], options: InventoryOptions) -> dict[str, str]:
    """The group, label and generator that a record of a list or a table states; NaN and blank cells state nothing."""
    named = ((name, record.get(column)) for name, column in value_columns(options).items())
    values = {
        name: _printable(str(value).strip())
        for name, value in named
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    return {name: value for name, value in values.items() if value}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text if _is_utf8(text) else text.encode(errors="backslashreplace").decode()


def _exists(folder: str, name: str) -> bool:
    return not folder.startswith("s3://") and os.path.lexists(folder + name)
