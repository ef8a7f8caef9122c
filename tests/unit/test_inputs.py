"""What a manifest lists, how its rows are named and grouped, and what each input format lists and reads."""

import io
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray.columns import MANIFEST_SCHEMA
from clipflow_ray.config import ImageLimits, InventoryOptions, validated
from clipflow_ray.errors import ConfigError, InputError, NotAnImage
from clipflow_ray.inputs import manifest as manifests
from clipflow_ray.inputs.format import InputFormat, Row, Source, format_named, row_id
from clipflow_ray.inputs.listing import check_apart, listing_hash, rows, rows_of, sources
from clipflow_ray.inputs.manifest import write_source
from clipflow_ray.inputs.reading import read_bytes
from clipflow_ray.inputs.registry import FORMATS
from clipflow_ray.place import Place
from tests import hex_format

FILES = ("loose.jpg", "cats/a.jpg", "cats/b.jpg", "cats/deep/c.jpg", "dogs/a.jpg")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(FILES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number + 1))
    return tmp_path / "photos"


def manifest(tmp_path: Path, *inputs: Path | str, **options: str) -> list[Row]:
    """The rows of all sources of `inputs`, in order, through parquet."""
    folder = tmp_path / f"manifest-{len(os.listdir(tmp_path))}"
    folder.mkdir()
    settings, rows = InventoryOptions(**options), []
    waiting = sources([Place.at(uri) for uri in inputs], settings)
    for number, source in enumerate(waiting):
        listed = write_source(source, number, Place.at(folder), settings)
        waiting += listed.sources
        tables = [pq.read_table(folder / name) for name in listed.files]
        assert all(table.schema == MANIFEST_SCHEMA for table in tables)
        assert sum(map(len, tables)) == listed.rows.total()
        rows += [row for table in tables for row in table.to_pylist()]
    assert len({row["row_id"] for row in rows}) == len(rows)
    return rows


def read(rows: list[Row], max_bytes: int = 99) -> list[bytes | str]:
    """The bytes of manifest rows, or the error code of a row that cannot be read."""
    table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
    outcomes = read_bytes(table, Place.at("."), ImageLimits(max_bytes=max_bytes))
    return [
        outcome if isinstance(outcome, bytes) else "no image" if isinstance(outcome, NotAnImage) else outcome.item_code
        for outcome in outcomes
    ]


def test_a_manifest_has_one_row_per_file(tmp_path: Path, photos: Path) -> None:
    rows = manifest(tmp_path, photos)
    assert {row["uri"]: row["bytes"] for row in rows} == {f"{photos}/{n}": i for i, n in enumerate(FILES, 1)}
    assert len(rows) == len(FILES)
    assert {(row["member"], row["etag"], row["input_format"]) for row in rows} == {("", None, "images")}
    assert read(rows) == [bytes(i) for i, _ in enumerate(FILES, 1)]


def test_the_schema_is_the_one_that_the_ledger_builds_on() -> None:
    kinds = {field.name: str(field.type) for field in MANIFEST_SCHEMA}
    names = ("row_id", "uri", "member", "input_format", "problem", "group", "etag", "label", "generator")
    assert kinds == dict.fromkeys(names, "string") | {"offset": "int64", "bytes": "int64"}


def test_the_group_is_the_first_folder_below_the_input_or_its_name(tmp_path: Path, photos: Path) -> None:
    groups = {row["uri"].removeprefix(f"{photos}/"): row["group"] for row in manifest(tmp_path, f"{photos}/")}
    assert groups == dict(zip(FILES, ("photos", "cats", "cats", "cats", "dogs"), strict=True))
    assert {row["group"] for row in manifest(tmp_path, photos / "dogs")} == {"dogs"}
    assert {row["group"] for row in manifest(tmp_path, photos / "loose.jpg")} == {"loose.jpg"}


def test_ids_are_unique_fixed_in_width_and_the_same_in_every_run(tmp_path: Path, photos: Path) -> None:
    first, second = manifest(tmp_path, photos), manifest(tmp_path, photos / "dogs", photos)
    ids = {row["uri"]: row["row_id"] for row in first}
    assert len(set(ids.values())) == len(FILES)
    assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in ids.values())
    assert ids == {row["uri"]: row["row_id"] for row in second}


def test_an_id_stays_what_it_was_when_it_was_first_published() -> None:
    """`printf 's3://b/k\\0m' | b2sum -l 128`; checkpoints of finished audits hold these."""
    assert row_id("s3://b/k", "m") == "74d2ebab737efb5cc6f1632c396e4d1a"


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.tuples(names, names), st.tuples(names, names))
def test_different_objects_have_different_ids(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (row_id(*one) == row_id(*other)) == (one == other)


def test_a_file_that_two_inputs_name_is_listed_once(tmp_path: Path, photos: Path) -> None:
    rows = manifest(tmp_path, photos / "cats", photos, photos / "cats" / "a.jpg", f"{photos}/../photos")
    assert sorted(row["uri"] for row in rows) == sorted(f"{photos}/{name}" for name in FILES)


def test_a_long_listing_fills_several_files_in_order(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "_ROWS_PER_FILE", 2)
    listed = [row["uri"].removeprefix(f"{photos}/") for row in manifest(tmp_path, photos)]
    assert listed == list(FILES)
    parts = sorted(path.name for path in tmp_path.glob("manifest-*/*"))
    assert parts == [f"part-00000-0000{part}.parquet" for part in range(3)]


@pytest.mark.parametrize("output", ["photos/out", "photos/cats/out", "photos", "photos/", "photos/new/../out"])
def test_an_output_inside_an_input_is_refused(tmp_path: Path, photos: Path, output: str) -> None:
    with pytest.raises(InputError, match=str(photos)):
        check_apart([Place.at(tmp_path / "elsewhere"), Place.at(photos)], Place.at(f"{tmp_path}/{output}"))


def test_a_relative_output_inside_an_input_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    with pytest.raises(InputError):
        check_apart([Place.at(".")], Place.at("out"))


def test_an_output_that_a_pattern_fits_is_refused(photos: Path) -> None:
    with pytest.raises(InputError, match="inside the input"):
        check_apart([Place.at(photos / "*")], Place.at(photos / "out"))
    check_apart([Place.at(photos / "*.jpg")], Place.at(photos / "out"))


def test_an_output_beside_an_input_with_the_same_beginning_is_fine(photos: Path) -> None:
    check_apart([Place.at(photos)], Place.at(f"{photos}-out"))


@pytest.mark.parametrize("broken", ["absent", "empty", "http://host/photos"])
def test_an_input_that_holds_nothing_is_an_input_error(tmp_path: Path, photos: Path, broken: str) -> None:
    (tmp_path / "empty").mkdir()
    uri = broken if "://" in broken else str(tmp_path / broken)
    with pytest.raises(InputError, match=re.escape(broken)):
        manifest(tmp_path, photos, uri)


def test_a_file_name_that_is_not_utf8_gives_a_row_or_an_input_error(tmp_path: Path, photos: Path) -> None:
    """A typed refusal is enough; a traceback about surrogates, or a file that silently goes missing, is not."""
    with open(os.fsencode(photos) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    try:
        assert len(manifest(tmp_path, photos)) == len(FILES) + 1
    except InputError as error:
        assert "caf" in str(error)


def test_the_listing_hash_is_equal_across_calls_and_changes_with_what_is_there(photos: Path) -> None:
    def now() -> str:
        return listing_hash(rows([Place.at(photos)], InventoryOptions()))

    seen = [now()]
    assert re.fullmatch("[0-9a-f]{16}", seen[0])
    assert now() == seen[0] == listing_hash(rows([Place.at(f"{photos}/")], InventoryOptions()))
    (photos / "dogs" / "b.jpg").write_bytes(b"x")
    seen.append(now())
    (photos / "dogs" / "b.jpg").write_bytes(b"xy")
    seen.append(now())
    (photos / "dogs" / "b.jpg").rename(photos / "dogs" / "c.jpg")
    seen.append(now())
    assert len(set(seen)) == 4
    (photos / "dogs" / "c.jpg").unlink()
    assert now() == seen[0]


NASTY = ("a b.jpg", "plus+sign.jpg", "%2F.jpg", "quote'\".jpg", "ünïcödé-日本.jpg", "tab\there.jpg")


def test_a_txt_list_gives_a_row_for_each_line_repeated_ones_too(tmp_path: Path) -> None:
    lines = [f"s3://shelf/{name}" for name in NASTY] * 2 + ["local.jpg", "/abs/path.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    rows = manifest(tmp_path, tmp_path / "list.txt")
    assert [row["uri"] for row in rows] == [*lines[:-2], f"{tmp_path}/local.jpg", "/abs/path.jpg"]
    assert rows == manifest(tmp_path, tmp_path / "list.txt")


def test_csv_and_jsonl_lists_pass_group_label_and_generator_through(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('image,site,label\ns3://b/k/1.jpg,north,"a, b"\ns3://b/k/2.jpg,,\n')
    (tmp_path / "list.jsonl").write_text('{"image": "s3://b/k/1.jpg", "label": 3, "generator": "x"}\n')
    first, second = manifest(tmp_path, tmp_path / "list.csv", uri_column="image", group_column="site")
    assert (first["group"], first["label"], first["generator"]) == ("north", "a, b", None)
    assert (second["group"], second["label"]) == ("k", None)
    (third,) = manifest(tmp_path, tmp_path / "list.jsonl", uri_column="image")
    assert (third["uri"], third["label"], third["generator"]) == ("s3://b/k/1.jpg", "3", "x")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("list.csv", "a,b\n1,2\n", "--uri-column"),
        ("list.jsonl", "{not json\n", "Line 1"),
        ("list.jsonl", "[1]\n", "not a JSON object"),
        ("list.txt", "\n\n", "lists nothing"),
    ],
)
def test_a_list_that_makes_no_sense_is_an_input_error(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        manifest(tmp_path, tmp_path / name)


def test_parquet_rows_are_found_by_number_whatever_the_column_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jpg").write_bytes(b"beside")  # what a row without bytes names
    pictures = [b"one", b"two", None]
    struct = [{"bytes": value, "path": "x.jpg"} for value in pictures]
    pq.write_table(pa.table({"image": struct, "label": [1, 2, 3]}), tmp_path / "in/a.parquet", row_group_size=2)
    pq.write_table(pa.table({"id": [1, 2, 3], "jpg": pictures}), tmp_path / "in/b.parquet")
    rows = manifest(tmp_path, tmp_path / "in", input_format="parquet")
    named = [(Path(row["uri"]).name, row["member"]) for row in rows]
    assert named == [("a.parquet", f"{n}:x.jpg") for n in "012"] + [("b.parquet", n) for n in "012"]
    assert [row["label"] for row in rows] == ["1", "2", "3", None, None, None]
    assert read(rows) == [b"one", b"two", b"beside", b"one", b"two", "empty"]
    assert read(rows, max_bytes=2) == ["too_large_bytes"] * 5 + ["empty"]


def test_a_parquet_file_of_uris_is_a_list(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["s3://b/1.jpg", "s3://b/1.jpg"]}), tmp_path / "list.parquet")
    assert [row["uri"] for row in manifest(tmp_path, tmp_path / "list.parquet")] == ["s3://b/1.jpg"] * 2
    (tmp_path / "1.jpg").write_bytes(b"one")
    pq.write_table(pa.table({"uri": [f"{tmp_path}/1.jpg", "/absent.jpg"]}), tmp_path / "list.parquet")
    assert read(manifest(tmp_path, tmp_path / "list.parquet")) == [b"one", "not_found"]
    pq.write_table(pa.table({"other": [1]}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="--bytes-column or --uri-column"):
        manifest(tmp_path, tmp_path / "none.parquet")


def test_tar_members_are_found_by_offset_and_those_that_are_no_images_are_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for name, data in (("a/1.jpg", b"first"), ("a/1.json", b"{}"), ("a/2.png", b"second!"), ("a/1.jpg", b"again")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    rows = manifest(tmp_path, tmp_path / "shard-0.tar")
    assert [row["member"] for row in rows] == ["a/1.jpg", "a/1.json", "a/2.png", "a/1.jpg"]
    assert read(rows) == [b"first", "no image", b"second!", b"again"]
    assert read(rows, max_bytes=5) == [b"first", "no image", "too_large_bytes", b"again"]


@pytest.mark.parametrize(("input_format", "container"), [("images", ""), ("webdataset", "tar"), ("parquet", "parquet")])
def test_a_manifest_from_before_formats_had_names_is_read(tmp_path: Path, input_format: str, container: str) -> None:
    (tmp_path / "1.jpg").write_bytes(b"one")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "1.jpg", "1.jpg")
    pq.write_table(pa.table({"image": [b"one"]}), tmp_path / "images.parquet")
    name = {"images": "1.jpg", "webdataset": "shard.tar", "parquet": "images.parquet"}[input_format]
    rows = manifest(tmp_path, tmp_path / name)
    assert [row.pop("input_format") for row in rows] == [input_format]
    older = pa.Table.from_pylist([row | {"container": container} for row in rows])
    assert read_bytes(older, Place.at("."), ImageLimits()) == [b"one"]


def test_an_image_folder_takes_labels_from_its_metadata_or_its_folders(tmp_path: Path) -> None:
    for name in ("train/cat/1.jpg", "train/dog/2.jpg"):
        (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(b"x")
    assert [row["label"] for row in manifest(tmp_path, tmp_path / "hf", input_format="hf")] == ["cat", "dog"]
    (tmp_path / "hf/train/metadata.csv").write_text("file_name,label,generator\ncat/1.jpg,tabby,none\n")
    rows = manifest(tmp_path, tmp_path / "hf")
    assert [(row["label"], row["generator"], row["group"]) for row in rows] == [
        ("tabby", "none", "train"),
        ("dog", None, "train"),
    ]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_group_by_prefix_counts_folders_below_the_input(tmp_path: Path, photos: Path, depth: int) -> None:
    rows = manifest(tmp_path, photos, group_by=f"prefix:{depth}")
    deep = next(row for row in rows if row["uri"].endswith("deep/c.jpg"))
    assert deep["group"] == "/".join(["cats", "deep"][:depth])


def test_a_list_without_its_uri_column_is_refused_even_if_an_imagefolder_would_do(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file_name,label\na.jpg,cat\n")
    with pytest.raises(InputError, match="--uri-column"):
        manifest(tmp_path, tmp_path / "list.csv")
    assert len(manifest(tmp_path, tmp_path / "list.csv", uri_column="file_name")) == 1


def test_every_format_of_the_registry_loads_under_its_name() -> None:
    for name in FORMATS:
        found = format_named(name)
        assert isinstance(found, InputFormat) and found.name == name
        assert validated(InventoryOptions, {"input_format": name}).input_format == name


def test_a_format_that_is_not_registered_is_refused_and_the_error_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"input_format: .*'hex' is not one of auto, images, manifest, parquet"):
        validated(InventoryOptions, {"input_format": "hex"})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("a.txt", "b/1.JPG", "b/2.tar"), {"images", "webdataset"}),
        (("a/metadata.csv", "b/1.jpg"), {"hf"}),
        (("1.jpg", "metadata.csv"), {"hf"}),
        (("LICENSE", "x.parquet", "y.tar"), {"images", "parquet", "webdataset"}),
        (("LICENSE",), {"images"}),
    ],
)
def test_each_file_of_a_folder_is_taken_for_what_it_is_whatever_comes_first(
    tmp_path: Path, files: tuple[str, ...], expected: set[str]
) -> None:
    for name in files:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            tarfile.open(path, "w").close()
        elif path.suffix == ".parquet":
            pq.write_table(pa.table({"image": [b"one"]}), path)
        else:
            path.write_text("file_name\n")
    settings, found = InventoryOptions(), set()
    waiting = sources([Place.at(tmp_path / "in")], settings)
    for source in waiting:
        for each in rows_of(source, settings, Counter()):
            if isinstance(each, Source):
                waiting.append(each)
            found.add(each.input_format if isinstance(each, Source) else each["input_format"])
    assert found == expected


def test_one_line_in_the_registry_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.hex").write_text(f"{b'one'.hex()}\n{b'two'.hex()}\n")
    assert [row["input_format"] for row in manifest(tmp_path, tmp_path / "in")] == ["images"]
    for name, line in hex_format.LINE.items():
        monkeypatch.setitem(FORMATS, name, line)
    rows = manifest(tmp_path, tmp_path / "in")
    assert [(row["input_format"], row["group"]) for row in rows] == [("hex", "toy")] * 2
    assert read(rows) == [b"one", b"two"]
    assert rows == manifest(tmp_path, tmp_path / "in", input_format="hex")
