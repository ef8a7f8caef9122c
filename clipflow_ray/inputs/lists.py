"""Input format `manifest`: a text, csv, tsv, jsonl or json file that lists the URIs of images, compressed or not."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.compressed import DAMAGED, opened
from clipflow_ray.inputs.format import (
    InputFormat,
    Row,
    Source,
    columns_found,
    group_of,
    manifest_row,
    not_read,
    problem,
    resolved,
    row_id,
    stated,
)
from clipflow_ray.place import Place
from clipflow_ray.recognise import is_base64_picture, is_text

_KINDS: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
    ".lst": "text",
    ".list": "text",
}
_COMPRESSED: Final = (".gz", ".zst", ".bz2", ".xz")
LIST_SUFFIXES: Final = (*_KINDS, *(kind + packed for kind in _KINDS for packed in _COMPRESSED))
SET_URI_COLUMN: Final = " Set --uri-column."
_DELIMITERS: Final = ",;\t|"
_LONG: Final = 200  # characters; a longer URI may be an image in base64


@dataclass(frozen=True)
class Record:
    """A record of a list: its values by the user's names of columns, or what is wrong with it."""

    values: Mapping[str, Any]
    problem: str | None = None


class Lists(InputFormat):
    """A list of URIs. A relative URI starts at the folder of the list."""

    suffixes = LIST_SUFFIXES
    in_folders = False

    def matches(self, head: bytes, compression: str | None) -> bool:
        return is_text(head)

    def list(self, source: Source, options: InventoryOptions, left_out: Counter[str]) -> Iterator[Row]:
        """One row for each line or record, even if it repeats the URI of an earlier one.

        Raises InputError if the list names nothing that can be read.
        """
        yield from listed_rows(source, records(source.place, options, left_out), options)


def listed_rows(source: Source, listed: Iterator[Record], options: InventoryOptions) -> Iterator[Row]:
    """The rows of the records of a list or a table. Raises InputError if none of them can be read."""
    uri_of_list = source.place.uri
    folder = uri_of_list.rpartition("/")[0] + "/"
    count, good, first = 0, 0, ""
    for count, record in enumerate(listed, 1):
        uri = resolved(folder, str(record.values.get(options.uri_column) or "").strip())
        why = record.problem or not_read(uri, len(uri) > _LONG and is_base64_picture(uri))
        if why is None:
            good += 1
            group = group_of(source.place.with_uri(uri).root, uri, options.group_depth)
        else:
            first = first or why
            group = group_of(source.base, uri_of_list, options.group_depth)
        identity = row_id(uri, f"{uri_of_list}:{count}")
        shown = uri[:_LONG] if why else uri
        row = manifest_row(source, shown or uri_of_list, group, "" if shown else f"record {count}", identity)
        if why is not None:
            row["problem"] = problem("bad_uri", f"{source.place.name}, record {count}: {why}")
        yield row | stated(record.values, options)
    if count == 0:
        raise InputError(f"{uri_of_list} lists nothing.")
    if good == 0:
        raise InputError(f"{uri_of_list} lists nothing that can be read. {first}")


def records(
    place: Place, options: InventoryOptions, left_out: Counter[str] | None = None, advice: str = SET_URI_COLUMN
) -> Iterator[Record]:
    """The records of a csv, tsv, jsonl or json file, or the lines of a text file as records of one column.

    Text is UTF-8, or UTF-16 with its mark; other bytes are replaced by backslash escapes, so that the record keeps its
    place. Comments of a text file (`# ...`) are counted in `left_out`. Raises InputError if the file cannot be read or
    lacks a column, with `advice` for that of the URIs. What goes wrong after the first record is a record with a
    problem.
    """
    some, counted = False, Counter[str]() if left_out is None else left_out
    try:
        with opened(place) as stream:
            for record in _parsed(place, _decoded(stream), options, advice, counted):
                some = True
                yield record
    except (*DAMAGED, csv.Error, ValueError, RecursionError) as error:
        if not some:
            raise InputError(f"Cannot read the list {place.uri}: {error}.") from error
        yield Record({}, f"The list does not read on from here: {error}.")


def _decoded(stream: Any) -> io.TextIOWrapper:
    start = stream.peek(4)[:4]
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return io.TextIOWrapper(stream, encoding, errors="backslashreplace", newline="")


def _parsed(
    place: Place, text: io.TextIOWrapper, options: InventoryOptions, advice: str, left_out: Counter[str]
) -> Iterator[Record]:
    name = place.uri.lower()
    name = next((name.removesuffix(each) for each in _COMPRESSED if name.endswith(each)), name)
    kind = next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), "text")
    if kind == "csv":
        yield from _csv(place, text, options, advice, "\t" if name.endswith((".tsv", ".tab")) else "")
    elif kind == "json":
        yield from _json(place, text, options, advice)
    else:
        for line in text:
            stripped = line.strip()
            if stripped == "#" or stripped.startswith(("# ", "#\t")):
                left_out["comments in lists"] += 1
            elif stripped:
                yield Record({options.uri_column: stripped})


def _csv(
    place: Place, text: io.TextIOWrapper, options: InventoryOptions, advice: str, delimiter: str
) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a caption may be long; the default is 128 kB
    header = text.readline()
    wanted = options.uri_column.strip().casefold()
    for each in delimiter or _DELIMITERS:
        names = next(csv.reader([header], delimiter=each), [])
        if wanted in [name.strip().casefold() for name in names]:
            break
    else:
        names = next(csv.reader([header], delimiter=delimiter or ","), [])
    found = columns_found(names, options, place.uri, {options.uri_column: advice})
    reader = csv.DictReader(text, names, restkey="", delimiter=each)
    for record in reader:
        yield Record({ours: record[theirs] for ours, theirs in found.items()})


def _json(place: Place, text: io.TextIOWrapper, options: InventoryOptions, advice: str) -> Iterator[Record]:
    """An array of objects or of URIs, or one object a line."""
    first = text.readline()
    while first.isspace():
        first = text.readline()
    if first.lstrip().startswith("["):
        values = json.loads(first + text.read())
        entries: Iterator[tuple[str, Any, str | None]] = (
            (f"Entry {number}", value, None) for number, value in enumerate(values, 1)
        )
    else:
        entries = _json_lines(chain([first], text))
    names: dict[str, None] = {}  # of all records, in the order of their first use
    wanted = options.uri_column.strip().casefold()
    failed: str | None = None
    for where, value, why in entries:
        if why is None and isinstance(value, str):
            value = {options.uri_column: value}
        if why is None and not isinstance(value, dict):
            why = f"{where} is not a JSON object."
        if why is not None:
            failed = failed or why
            yield Record({}, why)
            continue
        names |= dict.fromkeys(value)
        alike = next((key for key in value if key.strip().casefold() == wanted), options.uri_column)
        yield Record({options.uri_column: value.get(alike), **value})
    if names:
        columns_found([*names], options, place.uri, {options.uri_column: advice})
    elif failed:
        raise InputError(f"{place.uri}: {failed}")


def _json_lines(lines: Iterator[str]) -> Iterator[tuple[str, Any, str | None]]:
    """(place, value, what is wrong) of each line that is not blank."""
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            yield f"Line {number}", json.loads(line), None
        except (ValueError, RecursionError):
            yield f"Line {number}", None, f"Line {number} is not JSON."
