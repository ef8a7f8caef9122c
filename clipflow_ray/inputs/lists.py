"""Input format `manifest`: a txt, csv or jsonl file that lists the URIs of images."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, Final

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import InputFormat, Row, Source, group_of, manifest_row, row_id, stated
from clipflow_ray.place import Place, StoredObject

_SUFFIXES: Final = (".txt", ".csv", ".jsonl")


class Lists(InputFormat):
    """A list of URIs. A relative URI starts at the folder of the list."""

    def matches(self, place: Place, item: StoredObject) -> bool:
        return item.place == place and item.uri.lower().endswith(_SUFFIXES)

    def list(self, source: Source, options: InventoryOptions) -> Iterator[Row]:
        """One row for each line or record, even if it repeats the URI of an earlier one."""
        listed = source.place
        folder = listed.uri.rpartition("/")[0].rstrip("/")
        count = 0
        for count, record in enumerate(records(listed, options.uri_column), 1):
            uri = str(record.get(options.uri_column) or "")
            if uri and "://" not in uri and not uri.startswith("/"):
                uri = f"{folder}/{uri}"
            group = group_of(listed.with_uri(uri).root, uri, options.group_depth)
            identity = row_id(uri, f"{listed.uri}:{count}")
            yield manifest_row(source, uri, group, identity=identity) | stated(record, options)
        if count == 0:
            raise InputError(f"{listed.uri} lists nothing.")


def records(place: Place, column: str) -> Iterator[dict[str, Any]]:
    """The records of a csv or jsonl file, or the lines of a text file as records with the one `column`.

    Bytes that are not UTF-8 are replaced by backslash escapes, so that the record keeps its row. Raises InputError if
    the file cannot be read or parsed, or if a csv file lacks `column`.
    """
    uri = place.uri
    try:
        stream = place.stream()
    except OSError as error:
        raise InputError(f"Cannot read the list {uri}: {error}.") from error
    with stream, io.TextIOWrapper(stream, "utf-8", errors="backslashreplace", newline="") as text:
        if uri.lower().endswith(".csv"):
            reader = csv.DictReader(text)
            if column not in (reader.fieldnames or ()):
                raise InputError(f"{uri} has no column {column!r}; it has {reader.fieldnames}. Set --uri-column.")
            yield from reader
        elif uri.lower().endswith(".jsonl"):
            for number, line in enumerate(filter(str.strip, text), 1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"Line {number} of {uri} is not JSON.") from error
                if not isinstance(record, dict):
                    raise InputError(f"Line {number} of {uri} is not a JSON object.")
                yield record
        else:
            for line in text:
                if line.strip():
                    yield {column: line.rstrip("\r\n")}
