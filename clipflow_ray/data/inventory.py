"""Inputs -> a manifest: parquet files with one row per image, wherever the images lie.

An input is a folder or `s3://` prefix of image files, of parquet files or of webdataset tar shards, or one such file,
or a list (txt, csv, jsonl) of URIs. An input is split into sources that are listed apart, each as a stream.
"""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.columns import manifest_table
from clipflow_ray.config import InputFormat, InventoryOptions
from clipflow_ray.data.containers import PARQUET, TAR, image_column
from clipflow_ray.errors import InputError
from clipflow_ray.place import Place, StoredObject

_ROWS_PER_FILE: Final = 100_000
_ROWS_PER_GROUP: Final = 10_000
_LISTS: Final = (".txt", ".csv", ".jsonl")
_IMAGES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_METADATA: Final = ("metadata.csv", "metadata.jsonl")


Kind = Literal["images", "manifest", "parquet", "webdataset", "hf"]


@dataclass(frozen=True)
class Source:
    """One thing to list: `images` is a folder or prefix of files, the others are one file each.

    `base` is the input that it belongs to, from which groups are counted.
    """

    kind: Kind
    place: Place
    base: Place
    etag: str | None = None


def row_id(uri: str, member: str = "") -> str:
    """32 hex digits of the object's identity: the checkpoint key, the same in every run."""
    return hashlib.blake2b(f"{uri}\0{member}".encode(errors="surrogateescape"), digest_size=16).hexdigest()


def listing_hash(inputs: Sequence[Place], options: InventoryOptions | None = None) -> str:
    """16 hex digits over what `inputs` hold now: ids, sizes and ETags."""
    options = options or InventoryOptions()
    digest = hashlib.sha256()
    for source in sources(inputs, options.input_format):
        for row in rows(source, options):
            digest.update(f"{row['row_id']} {row['bytes']} {row['etag']}\n".encode())
    return digest.hexdigest()[:16]


def check_apart(inputs: Sequence[Place], folder: Place) -> None:
    """Raise InputError where `folder`, which is to be written, lies inside an input."""
    for place in inputs:
        if place.holds(folder / ""):
            raise InputError(f"The output lies inside the input {place.uri}; write it elsewhere.")


def write_source(source: Source, number: int, folder: Place, options: InventoryOptions) -> tuple[list[str], int]:
    """List one source into `part-<number>-<k>.parquet` under `folder`; returns the names and the row count."""
    names: list[str] = []
    count, listed = 0, rows(source, options)
    while chunk := list(islice(listed, _ROWS_PER_FILE)):
        names.append(f"part-{number:05d}-{len(names):05d}.parquet")
        (folder / names[-1]).write_parquet(manifest_table(chunk), _ROWS_PER_GROUP)
        count += len(chunk)
    return names, count


def sources(inputs: Sequence[Place], wanted: InputFormat) -> list[Source]:
    """What there is to list, none of it twice; a prefix on S3 is split by its first folders, to be listed at once."""
    roots = sorted(set(inputs), key=lambda place: place.uri)
    roots = [place for place in roots if not any(other.holds(place) for other in roots if other != place)]
    result: list[Source] = []
    for place in roots:
        kind = _kind(place) if wanted == "auto" else wanted
        if kind == "images":
            result += [Source("images", part, place) for part in place.folders()]
        elif kind in ("hf", "manifest"):
            result.append(Source(kind, place, place))
        else:
            suffix = ".tar" if kind == "webdataset" else ".parquet"
            files = [item for item in place.objects() if item.uri.endswith(suffix)]
            if not files:
                raise InputError(f"{place.uri} holds no {suffix} file; give --input-format what it is.")
            result += [Source(kind, item.place, place, item.etag) for item in files]
    return result


def rows(source: Source, options: InventoryOptions) -> Iterator[dict[str, Any]]:
    """The manifest rows of one source, as a stream."""
    if source.kind == "images":
        return (_file_row(source, item, options) for item in source.place.objects(required=source.place == source.base))
    if source.kind == "hf":
        return _hugging_face(source, options)
    if source.kind == "manifest":
        return _listed(source, options)
    if source.kind == "webdataset":
        return _tar_members(source, options)
    return _parquet_rows(source, options)


def _kind(place: Place) -> Kind:
    """By the name of the input, or of the first file that it holds."""
    for item in place.objects():
        name = item.uri.lower()
        if name.endswith(_LISTS) and item.place == place:
            return "manifest"
        if name.rsplit("/", 1)[-1] in _METADATA:
            return "hf"
        if name.endswith(_IMAGES):
            return "images"
        if name.endswith((".tar", ".parquet")):
            return "webdataset" if name.endswith(".tar") else "parquet"
    return "images"


def _file_row(source: Source, item: StoredObject, options: InventoryOptions) -> dict[str, Any]:
    try:
        item.uri.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{item.uri!a} is not a UTF-8 name: rename it.") from error
    group = group_of(source.base.uri, item.uri, options.group_depth)
    return _row(item.uri, group=group, bytes=item.bytes, etag=item.etag)


def _row(uri: str, member: str = "", identity: str | None = None, **known: Any) -> dict[str, Any]:
    """A manifest row; what is not `known` is null."""
    return {
        "row_id": identity or row_id(uri, member),
        "uri": uri,
        "member": member,
        "container": "",
        "offset": None,
        "etag": None,
        "group": None,
        "bytes": None,
        "label": None,
        "generator": None,
    } | known


def group_of(base: str, uri: str, depth: int) -> str:
    """The first `depth` folders below `base`, or the name of `base` where there are none."""
    folders = uri.removeprefix(base).lstrip("/").split("/")[:-1][:depth]
    return "/".join(folders) or base.rstrip("/").rsplit("/", 1)[-1]


def _hugging_face(source: Source, options: InventoryOptions) -> Iterator[dict[str, Any]]:
    """An imagefolder: columns of a metadata file by `file_name`, or else the last folder as the label."""
    metadata: dict[str, dict[str, Any]] = {}
    files = list(source.place.objects())
    for item in files:
        folder, _, name = item.uri.rpartition("/")
        if name in _METADATA:
            for record in _records(item.place, "file_name"):
                if not record.get("file_name"):
                    raise InputError(f"{item.uri} has no column file_name; that is what an imagefolder needs.")
                metadata[f"{folder.rstrip('/')}/{record['file_name']}"] = record
    for item in files:
        if item.uri.rsplit("/", 1)[-1] not in _METADATA:
            row = _file_row(source, item, options)
            folders = item.uri.removeprefix(source.place.uri).strip("/").split("/")[:-1]
            row["label"] = folders[-1] if len(folders) > 1 or (folders and not metadata) else None
            yield row | _passed(metadata.get(item.uri, {}), options)


def _listed(source: Source, options: InventoryOptions) -> Iterator[dict[str, Any]]:
    """One row a line or record, repeated URIs included; relative URIs start at the list's own folder."""
    folder = source.place.uri.rpartition("/")[0].rstrip("/")
    count = 0
    for count, record in enumerate(_records(source.place, options.uri_column), 1):
        uri = str(record.get(options.uri_column) or "")
        if uri and "://" not in uri and not uri.startswith("/"):
            uri = f"{folder}/{uri}"
        group = group_of(source.place.with_uri(uri).root.uri, uri, options.group_depth)
        yield _row(uri, identity=row_id(uri, f"{source.place.uri}:{count}"), group=group) | _passed(record, options)
    if count == 0:
        raise InputError(f"{source.place.uri} lists nothing.")


def _records(place: Place, column: str) -> Iterator[dict[str, Any]]:
    """The records of a txt (one column), csv or jsonl file; a name that is not UTF-8 keeps its place, escaped."""
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


def _tar_members(source: Source, options: InventoryOptions) -> Iterator[dict[str, Any]]:
    """Image members of a shard, by name, offset and size; headers alone are read where the file can seek."""
    uri = source.place.uri
    group = group_of(source.base.uri, uri, options.group_depth)
    seen: dict[str, int] = {}
    try:
        with source.place.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(_IMAGES):
                    seen[member.name] = seen.get(member.name, -1) + 1
                    again = f"#{seen[member.name]}" if seen[member.name] else ""
                    yield _row(
                        uri,
                        member.name,
                        row_id(uri, member.name + again),
                        container=TAR,
                        offset=member.offset_data,
                        group=group,
                        bytes=member.size,
                        etag=source.etag,
                    )
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{uri} does not read as an uncompressed tar: {error}.") from error


def _parquet_rows(source: Source, options: InventoryOptions) -> Iterator[dict[str, Any]]:
    """Rows with images inside by their number, or with a URI as in a list."""
    place = source.place
    try:
        with place.open() as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            inside = image_column(schema, options.bytes_column)
            if inside is None and options.uri_column not in schema.names:
                raise InputError(
                    f"{place.uri} has neither image bytes nor a column {options.uri_column!r}; it has "
                    f"{', '.join(schema.names)}. Set --bytes-column or --uri-column."
                )
            wanted = [c for c in (*_columns(options).values(), options.uri_column) if c in schema.names]
            number = -1
            for batch in _batches(parquet, wanted):
                for record in batch:
                    number += 1
                    if inside is None:
                        uri = str(record.get(options.uri_column) or "")
                        row = _row(uri, identity=row_id(uri, f"{place.uri}:{number}"))
                    else:
                        row = _row(place.uri, str(number), container=PARQUET, offset=number, etag=source.etag)
                    row["group"] = group_of(source.base.uri, place.uri, options.group_depth)
                    yield row | _passed(record, options)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{place.uri} does not read as parquet: {error}.") from error


def _batches(parquet: pq.ParquetFile, columns: Sequence[str]) -> Iterable[list[dict[str, Any]]]:
    if columns:
        return (batch.to_pylist() for batch in parquet.iter_batches(columns=columns))
    return ([{}] * parquet.metadata.row_group(at).num_rows for at in range(parquet.metadata.num_row_groups))


def _columns(options: InventoryOptions) -> dict[str, str]:
    return {"group": options.group_column, "label": options.label_column, "generator": options.generator_column}


def _passed(record: dict[str, Any], options: InventoryOptions) -> dict[str, str]:
    """What a record says of group, label and generator."""
    named = ((name, record.get(column)) for name, column in _columns(options).items())
    return {name: str(value) for name, value in named if value not in (None, "")}
