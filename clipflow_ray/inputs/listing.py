"""List inputs of any format: their sources, their manifest rows, and a hash of the listing."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from glob import escape
from itertools import islice
from typing import Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.compressed import DAMAGED, head_of
from clipflow_ray.inputs.format import (
    HoldsNoImagesError,
    InputFormat,
    Row,
    Source,
    format_named,
    formats,
    no_image,
    unlisted,
)
from clipflow_ray.inputs.images import absent, is_metadata, items
from clipflow_ray.inputs.lists import LIST_SUFFIXES
from clipflow_ray.inputs.patterns import Selection, fixed_folder, is_pattern, selection
from clipflow_ray.place import Place, StoredObject
from clipflow_ray.recognise import claims_image, kind_in_words

log = logging.getLogger(__name__)

_LOOKED_AT: Final = 100_000  # files of a folder among which metadata are looked for before its listing


def sources(inputs: Sequence[Place], options: InventoryOptions, left_out: Counter[str] | None = None) -> list[Source]:
    """The parts of the inputs, to be listed at the same time. An input that lies inside another one is left out.

    An input may be a pattern; see `patterns`. Raises InputError if an input is not there.
    """
    counted: Counter[str] = Counter() if left_out is None else left_out
    roots: list[Source] = []
    for root in sorted(
        (_root(place, options) for place in set(inputs)), key=lambda root: (root.place.uri, root.base.uri)
    ):
        outer = next((at for at, other in enumerate(roots) if _holds(other, root)), None)
        if outer is None:
            roots.append(root)
        elif roots[outer].selected is not None:
            roots[outer] = _joined(roots[outer], root)
    return [part for root in roots for part in _parts(root, counted)]


def rows_of(source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row | Source]:
    """The manifest rows of one source, as a stream, and the sources in it. `left_out` counts what gets no row.

    Raises InputError if the user's settings do not suit a source that the user has named.
    """
    some = False
    try:
        for found in _listed(source, options, left_out):
            yield found
            some = True
    except InputError as error:
        if source.place == source.base:
            raise
        if some:
            return  # its rows say what is wrong
        row = unlisted(source, options, f"cannot be listed: {error}")
        yield row | {"problem": no_image(str(error))} if isinstance(error, HoldsNoImagesError) else row


def rows(inputs: Sequence[Place], options: InventoryOptions) -> Iterator[Row]:
    """The manifest rows of all inputs, as a stream, listed in this process. Logs what is left out."""
    left_out: Counter[str] = Counter()
    waiting = sources(inputs, options, left_out)
    for source in waiting:
        for found in rows_of(source, options, left_out):
            if isinstance(found, Source):
                waiting.append(found)
            else:
                yield found
    say(Counter(), left_out)


def say(by_format: Counter[str], left_out: Counter[str]) -> None:
    """Log in one line how many images were recognised as which format, and in another what was left out and why."""
    if by_format:
        log.info("input: %s", ", ".join(f"{count} rows as {name}" for name, count in by_format.most_common()))
    if left_out.total():
        log.warning("left out: %s", "; ".join(f"{count} {why}" for why, count in left_out.most_common() if count))


def listing_hash(listed: Iterable[Row]) -> str:
    """16 hex digits over the ids, sizes and ETags of manifest rows."""
    digest = hashlib.sha256()
    for row in listed:
        digest.update(f"{row['row_id']} {row['bytes']} {row['etag']}\n".encode())
    return digest.hexdigest()[:16]


def check_apart(inputs: Sequence[Place], folder: Place) -> None:
    """Raise InputError if `folder`, which is to be written, lies inside an input."""
    for place in inputs:
        found = place.found()
        named = found.place if isinstance(found, StoredObject) else found
        if named is None:
            inside = is_pattern(place.uri) and selection(place.uri).keeps((folder / "part").uri)
        else:
            inside = named.holds(folder / "")
        if inside:
            raise InputError(f"The output lies inside the input {place.uri}; write it elsewhere.")


def _root(place: Place, options: InventoryOptions) -> Source:
    """An input as one source. Its place is the folder above the first wildcard if the input is a pattern."""
    wanted, found = options.input_format, place.found()
    if isinstance(found, StoredObject):
        return Source(wanted, found.place, found.place, etag=found.etag)
    if found is not None:
        return Source(wanted, found, found, is_folder=True)
    if not is_pattern(place.uri):
        raise InputError(f"There is nothing at {place.uri}: check the path, or the prefix and its bucket.")
    folder = place.with_uri(fixed_folder(place.uri))
    if place.is_local:
        folder = place.with_uri(folder.uri.rstrip("/") or "/")
    if wanted == "auto" and place.uri.lower().endswith(LIST_SUFFIXES):
        wanted = "manifest"  # a pattern of lists
    return Source(wanted, folder, folder, is_folder=True, selected=selection(place.uri))


def _holds(outer: Source, inner: Source) -> bool:
    """Whether `outer` lists what `inner` lists. A folder does not read the lists in it."""
    is_list = inner.input_format == "manifest" or inner.place.uri.lower().endswith(LIST_SUFFIXES)
    same = outer.input_format == inner.input_format
    return outer.is_folder and same and not is_list and outer.place.holds(inner.place)


def _joined(outer: Source, inner: Source) -> Source:
    """One source for a pattern and for another input below its folder."""
    if inner.selected is None and inner.place == outer.place:
        return inner
    own = inner.selected or Selection(patterns=(escape(inner.place.uri.rstrip("/")),))
    assert outer.selected is not None  # the caller has checked it
    return replace(outer, selected=outer.selected | own)


def _parts(root: Source, left_out: Counter[str]) -> list[Source]:
    """A folder on s3 is split by its first folders, unless a pattern selects some of its objects."""
    if not root.is_folder or root.selected is not None:
        return [root]
    return [replace(root, place=part) for part in root.place.folders(left_out)]


def _listed(source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row | Source]:
    if not source.is_folder:
        yield from _file(source, options, left_out)
        return
    wanted = source.input_format
    if wanted == "auto":
        first = islice(items(source, options, Counter()), _LOOKED_AT)
        wanted = "hf" if any(map(is_metadata, first)) else "images"
    found = format_named(wanted)
    if not found.suffixes:
        yield from found.list(replace(source, input_format=wanted), options, left_out)
        return
    some = False
    for item in items(source, options, left_out):
        if item.uri.lower().endswith(found.suffixes):
            some = True
            yield Source(wanted, item.place, source.base, etag=item.etag)
        else:
            left_out[f"files that are not {wanted}; --input-format auto reads other kinds"] += 1
    yield from absent(source, options)
    if not some and source.place == source.base:
        endings = ", ".join(found.suffixes)
        raise InputError(f"{source.place.uri} holds no file that ends in {endings}; give --input-format what it is.")


def _file(source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row | Source]:
    """The rows of one file, whose format is that of its first bytes; its name counts if they say nothing."""
    name = source.place.uri.lower()
    by_name = next((each for each in formats() if name.endswith(each.suffixes)), None)
    if source.input_format != "auto":
        by_name = format_named(source.input_format)
    elif claims_image(name):
        by_name = format_named("images")
    if by_name is not None:
        source = replace(source, input_format=by_name.name)
    if by_name is None or by_name.suffixes:  # for other names, the format looks at the file itself
        try:
            head, compression = head_of(source.place)
        except DAMAGED as error:
            yield unlisted(source, options, f"cannot be read: {error}")
            return
        found = _by_content(by_name, head, compression)
        if found is None and source.place == source.base and by_name is None:
            raise InputError(f"{source.place.uri} is {_in_words(head, compression)}, which is not read as an input.")
        if found is None:
            yield unlisted(source, options, f"is not what its name says: it is {_in_words(head, compression)}.")
            return
    else:
        found = by_name
    yield from found.list(replace(source, input_format=found.name), options, left_out)


def _in_words(head: bytes, compression: str | None) -> str:
    return kind_in_words(head) + (f", compressed by {compression}" if compression else "")


def _by_content(by_name: InputFormat | None, head: bytes, compression: str | None) -> InputFormat | None:
    """The format of a file by its first bytes. A text is a list only if its name does not claim another format."""
    if by_name is not None and by_name.matches(head, compression):
        return by_name
    other = [each for each in formats() if by_name is None or each.in_folders]
    return next((each for each in other if each.matches(head, compression)), None)
