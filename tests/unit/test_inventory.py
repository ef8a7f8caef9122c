"""What a manifest lists, how its rows are named and grouped, and when the hash of a listing changes."""

import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray.config import S3Options
from clipflow_ray.data import inventory
from clipflow_ray.data.inventory import MANIFEST_SCHEMA, listing_hash, row_id, write_manifest
from clipflow_ray.errors import InputError

LOCAL = S3Options()
FILES = ("loose.jpg", "cats/a.jpg", "cats/b.jpg", "cats/deep/c.jpg", "dogs/a.jpg")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(FILES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number + 1))
    return tmp_path / "photos"


def manifest(tmp_path: Path, *inputs: Path | str) -> list[dict]:
    folder = tmp_path / f"manifest-{len(os.listdir(tmp_path))}"
    count = write_manifest([str(uri) for uri in inputs], str(folder), LOCAL)
    table = pq.read_table(folder)
    assert (len(table), table.schema) == (count, MANIFEST_SCHEMA)
    return table.to_pylist()


def test_a_manifest_has_one_row_per_file(tmp_path: Path, photos: Path) -> None:
    rows = manifest(tmp_path, photos)
    assert {row["uri"]: row["bytes"] for row in rows} == {f"{photos}/{n}": i for i, n in enumerate(FILES, 1)}
    assert len(rows) == len(FILES)
    assert {(row["member"], row["etag"]) for row in rows} == {("", None)}


def test_the_schema_is_the_one_that_the_ledger_builds_on() -> None:
    names = {"row_id": "string", "uri": "string", "member": "string", "group": "string", "bytes": "int64"}
    assert {field.name: str(field.type) for field in MANIFEST_SCHEMA} == names | {"etag": "string"}


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


def test_a_long_listing_fills_several_files_in_order(tmp_path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_ROWS_PER_FILE", 2)
    listed = [row["uri"].removeprefix(f"{photos}/") for row in manifest(tmp_path, photos)]
    assert listed == list(FILES)
    parts = sorted(path.name for path in tmp_path.glob("manifest-*/*"))
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_a_listing_made_again_after_the_input_shrank_leaves_no_old_part(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_ROWS_PER_FILE", 2)
    folder = tmp_path / "manifest"
    write_manifest([str(photos)], str(folder), LOCAL)
    (folder / "mine.txt").write_text("kept")
    for name in FILES[:3]:
        (photos / name).unlink()
    assert write_manifest([str(photos)], str(folder), LOCAL) == 2
    assert sorted(os.listdir(folder)) == ["mine.txt", "part-00000.parquet"]


@pytest.mark.parametrize("output", ["photos/out", "photos/cats/out", "photos", "photos/", "photos/new/../out"])
def test_an_output_inside_an_input_is_refused(tmp_path: Path, photos: Path, output: str) -> None:
    with pytest.raises(InputError, match=str(photos)):
        write_manifest([str(tmp_path / "elsewhere"), str(photos)], f"{tmp_path}/{output}", LOCAL)
    assert not list(photos.rglob("*.parquet"))


def test_a_relative_output_inside_an_input_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    with pytest.raises(InputError):
        write_manifest(["."], "out", LOCAL)


def test_an_output_under_an_s3_prefix_that_is_listed_is_refused() -> None:
    """`s3://shelf/photos` lists every key that starts so, `photos-out/` too."""
    with pytest.raises(InputError, match="inside the input"):
        write_manifest(
            ["s3://shelf/photos"], "s3://shelf/photos-out/manifest", S3Options(endpoint_url="http://[::1]:9")
        )


def test_an_output_beside_an_input_with_the_same_beginning_is_fine(tmp_path: Path, photos: Path) -> None:
    assert write_manifest([str(photos)], f"{photos}-out", LOCAL) == len(FILES)


@pytest.mark.parametrize("broken", ["absent", "empty", "http://host/photos"])
def test_an_input_that_holds_nothing_is_an_input_error(tmp_path: Path, photos: Path, broken: str) -> None:
    (tmp_path / "empty").mkdir()
    uri = broken if "://" in broken else str(tmp_path / broken)
    with pytest.raises(InputError, match=re.escape(broken)):
        write_manifest([str(photos), uri], str(tmp_path / "out"), LOCAL)


def test_a_file_name_that_is_not_utf8_gives_a_row_or_an_input_error(tmp_path: Path, photos: Path) -> None:
    """A typed refusal is enough; a traceback about surrogates, or a file that silently goes missing, is not."""
    with open(os.fsencode(photos) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    try:
        assert write_manifest([str(photos)], str(tmp_path / "out"), LOCAL) == len(FILES) + 1
    except InputError as error:
        assert "caf" in str(error)


def test_the_listing_hash_is_equal_across_calls_and_changes_with_what_is_there(photos: Path) -> None:
    def now() -> str:
        return listing_hash([str(photos)], LOCAL)

    seen = [now()]
    assert re.fullmatch("[0-9a-f]{16}", seen[0])
    assert now() == seen[0] == listing_hash([f"{photos}/"], LOCAL)
    (photos / "dogs" / "b.jpg").write_bytes(b"x")
    seen.append(now())
    (photos / "dogs" / "b.jpg").write_bytes(b"xy")
    seen.append(now())
    (photos / "dogs" / "b.jpg").rename(photos / "dogs" / "c.jpg")
    seen.append(now())
    assert len(set(seen)) == 4
    (photos / "dogs" / "c.jpg").unlink()
    assert now() == seen[0]
