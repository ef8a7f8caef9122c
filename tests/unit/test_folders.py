"""Folders as people have them: captions, hidden files, links, archives beside pictures, metadata, patterns."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipflow_ray.errors import InputError
from tests.accounts import BESIDE, NAMES, PICTURES, account, codes, counts, tar, write


def test_captions_sidecars_and_cards_are_no_errors(tmp_path: Path) -> None:
    others = ("p0.txt", "p0.json", "p1.caption", "README.md", "LICENSE", "Thumbs.db", "._p0.jpg", "__MACOSX/p0.jpg")
    write(tmp_path / "in", [*BESIDE, *((name, b"words") for name in others)])
    found = account(tmp_path / "in")
    assert counts(found) == {"ok": 4, "skipped_not_image": len(others)}
    assert codes(found) == {}
    assert all(row["error_message"] for row in found if row["status"] == "skipped_not_image")


def test_a_file_whose_name_says_nothing_is_judged_by_its_first_bytes(tmp_path: Path) -> None:
    files = [("scan", PICTURES[0]), ("b.img", PICTURES[1]), ("c.dat", b"\1\2\3" * 99), ("d.bin", b""), ("e", b"words")]
    found = {Path(row["uri"]).name: row for row in account(write(tmp_path / "in", files))}
    assert {name: row["status"] for name, row in found.items()} == {
        "scan": "ok",
        "b.img": "ok",
        "c.dat": "skipped_not_image",
        "d.bin": "skipped_not_image",
        "e": "skipped_not_image",
    }
    assert "text" in found["e"]["error_message"]


def test_a_large_file_that_is_no_image_is_no_error_either(tmp_path: Path) -> None:
    write(tmp_path / "in", [("a.jpg", PICTURES[0])])
    for name, start in (("weights.bin", b"\1\2\3\4"), ("huge", PICTURES[1])):
        with open(tmp_path / "in" / name, "wb") as file:
            file.write(start)
            file.truncate(65 * 2**20)
    found = {Path(row["uri"]).name: (row["status"], row["error_code"]) for row in account(tmp_path / "in")}
    assert found == {
        "a.jpg": ("ok", None),
        "weights.bin": ("skipped_not_image", None),
        "huge": ("error", "too_large_bytes"),
    }


def test_a_file_that_calls_itself_an_image_and_is_none_stays_an_error(tmp_path: Path) -> None:
    found = account(write(tmp_path / "in", [("page.jpg", b"<html>404</html>"), ("a.svg", b"<svg/>"), *BESIDE]))
    assert counts(found) == {"ok": 4, "error": 2} and codes(found) == {"unsupported_format": 2}


def test_pictures_beside_archives_and_tables_are_all_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in")
    tar(tmp_path / "in/SHARD.TAR")
    pq.write_table(pa.table({"image": list(PICTURES)}), tmp_path / "in/DATA.PARQUET")
    assert counts(account(tmp_path / "in")) == {"ok": 12}
    images = account(tmp_path / "in", input_format="images")
    assert counts(images) == {"ok": 4, "skipped_not_image": 2}
    with caplog.at_level(logging.WARNING):
        assert counts(account(tmp_path / "in", input_format="webdataset")) == {"ok": 4}
    assert "left out: 5 files that are not webdataset" in caplog.text


def test_a_table_without_images_among_pictures_is_a_file_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "in")
    pq.write_table(pa.table({"box": [1, 2]}), tmp_path / "in/boxes.parquet")
    found = account(tmp_path / "in")
    assert counts(found) == {"ok": 4, "skipped_not_image": 1}


def test_hidden_files_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in", [*BESIDE, (".DS_Store", b"x"), (".git/a.jpg", b"x"), (".hidden.jpg", b"x")])
    with caplog.at_level(logging.WARNING):
        assert counts(account(tmp_path / "in")) == {"ok": 4}
    assert [record.getMessage() for record in caplog.records] == ["left out: 3 hidden files or folders (leading dot)"]


def test_a_linked_folder_is_followed_once_and_a_loop_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "elsewhere")
    write(tmp_path / "in", [("x.jpg", PICTURES[0]), ("own/y.jpg", PICTURES[1])])
    for name, target in (
        ("linked", tmp_path / "elsewhere"),
        ("linked_again", tmp_path / "elsewhere"),
        ("to_own", tmp_path / "in/own"),
        ("loop", tmp_path),
    ):
        os.symlink(target, tmp_path / "in" / name)
    os.symlink("nowhere.jpg", tmp_path / "in/broken.jpg")
    with caplog.at_level(logging.WARNING):
        found = account(tmp_path / "in")
    assert counts(found) == {"ok": 6, "error": 1} and codes(found) == {"not_found": 1}
    assert "2 links to folders that are listed under another name" in caplog.text
    assert "1 links to folders that hold the input" in caplog.text


def test_one_name_that_is_not_utf8_is_one_error_row(tmp_path: Path) -> None:
    write(tmp_path / "in")
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg", "wb") as file:
        file.write(PICTURES[0])
    found = account(tmp_path / "in")
    assert counts(found) == {"ok": 4, "error": 1} and codes(found) == {"bad_uri": 1}
    assert "caf" in next(row["error_message"] for row in found if row["error_code"])


@pytest.mark.parametrize("picture", ["img0.jpg", "photo0.jpg"])
def test_metadata_are_recognised_wherever_they_sort(tmp_path: Path, picture: str) -> None:
    write(tmp_path / "in", [(picture, PICTURES[0]), ("metadata.csv", f"file_name,label\n{picture},x\n".encode())])
    (row,) = account(tmp_path / "in")
    assert (row["status"], row["label"]) == ("ok", "x")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_give_labels_and_a_row_for_each_file_that_is_not_there(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "in/sub", BESIDE[:2])
    names = ["sub/p0.jpg", "./sub/p1.jpg", "gone.jpg"]
    path = tmp_path / f"in/metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"file_name": names, "label": ["a", "b", "c"]}), path)
    else:
        lines = {
            "csv": "\ufefffile_name,label\n" + "".join(f"{n},{v}\n" for n, v in zip(names, "abc", strict=True)),
            "jsonl": "".join(f'{{"file_name": "{n}", "label": "{v}"}}\n' for n, v in zip(names, "abc", strict=True)),
        }
        path.write_text(lines[kind], encoding="utf-8")
    found = account(tmp_path / "in")
    assert {Path(row["uri"]).name: (row["status"], row["label"]) for row in found} == {
        "p0.jpg": ("ok", "a"),
        "p1.jpg": ("ok", "b"),
        "gone.jpg": ("error", "c"),
    }
    assert codes(found) == {"not_found": 1}


def test_metadata_without_file_names_are_one_error_row_and_the_pictures_are_listed(tmp_path: Path) -> None:
    found = account(write(tmp_path / "in", [*BESIDE, ("metadata.csv", b"name,label\np0.jpg,x\n")]))
    assert counts(found) == {"ok": 4, "error": 1}
    assert "file_name" in next(row["error_message"] for row in found if row["error_code"])


def test_a_split_is_no_label(tmp_path: Path) -> None:
    names = ("train/a.jpg", "test-0001/b.jpg", "Validation/c.jpg", "train/cat/d.jpg", "trains/e.jpg")
    found = account(write(tmp_path / "in", [(name, PICTURES[0]) for name in names]), input_format="hf")
    labels = {str(Path(row["uri"]).relative_to(tmp_path / "in")): row["label"] for row in found}
    assert labels == dict(zip(names, (None, None, None, "cat", "trains"), strict=True))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", {"p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg"}),
        ("p{0,2}.jpg", {"p0.jpg", "p2.jpg"}),
        ("p{1..3}.jpg", {"p1.jpg", "p2.jpg", "p3.jpg"}),
        ("**/*.png", {"deep/er/q.png", "deep/q.png"}),
        ("deep*", {"deep/er/q.png", "deep/q.png"}),
        ("*/q.png", {"deep/q.png"}),
        ("p[0-1].???", {"p0.jpg", "p1.jpg"}),
    ],
)
def test_an_input_may_be_a_pattern(tmp_path: Path, pattern: str, expected: set[str]) -> None:
    write(tmp_path / "in", [*BESIDE, ("deep/q.png", PICTURES[0]), ("deep/er/q.png", PICTURES[1])])
    found = account(f"{tmp_path}/in/{pattern}")
    assert {str(Path(row["uri"]).relative_to(tmp_path / "in")) for row in found} == expected
    assert {row["group"] for row in found} <= {"in", "deep"}


def test_patterns_that_overlap_list_a_file_once_and_a_missing_name_is_an_error_row(tmp_path: Path) -> None:
    write(tmp_path / "in")
    patterns = (f"{tmp_path}/in/*.jpg", f"{tmp_path}/in/p{{0,9}}.jpg", f"{tmp_path}/in/p1.jpg")
    found = account(*patterns)
    assert counts(found) == {"ok": 4, "error": 1} and codes(found) == {"not_found": 1}
    with pytest.raises(InputError, match=r"nothing that .*webp fits"):
        account(f"{tmp_path}/in/*.webp")


def test_shards_and_lists_may_be_named_by_a_pattern(tmp_path: Path) -> None:
    for at in range(3):
        tar(tmp_path / f"in/s-{at:03d}.tar", BESIDE[:2])
    assert counts(account(f"{tmp_path}/in/s-{{000..001}}.tar")) == {"ok": 4}
    assert counts(account(f"{tmp_path}/in/*.tar")) == {"ok": 6}
    write(tmp_path / "lists", [*BESIDE, ("a.txt", b"p0.jpg\n"), ("b.txt", b"p1.jpg\n"), ("c.csv", b"x\n")])
    assert counts(account(f"{tmp_path}/lists/*.txt")) == {"ok": 2}
    assert counts(account(f"{tmp_path}/lists/*.txt", f"{tmp_path}/lists/p*.jpg")) == {"ok": 6}
    assert counts(account(f"{tmp_path}/lists/{{a,z}}.txt")) == {"ok": 1, "error": 1}


def test_a_name_with_the_signs_of_a_pattern_is_that_name(tmp_path: Path) -> None:
    write(tmp_path / "in[1]", [("a*.jpg", PICTURES[0]), ("ab.jpg", PICTURES[1]), ("c{1,2}.jpg", PICTURES[2])])
    assert len(account(f"{tmp_path}/in[1]")) == 3
    assert [Path(row["uri"]).name for row in account(f"{tmp_path}/in[1]/a*.jpg")] == ["a*.jpg"]


def test_include_and_exclude_choose_files_and_count_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in", [*BESIDE, ("thumbs/p0.jpg", PICTURES[0]), ("q.png", PICTURES[1])])
    with caplog.at_level(logging.WARNING):
        found = account(tmp_path / "in", include=("*.jpg",), exclude=("thumbs", "/p{0,1}.jpg"))
    assert sorted(Path(row["uri"]).name for row in found) == list(NAMES[2:])
    assert "3 files that an --exclude fits" in caplog.text and "1 files that no --include fits" in caplog.text


def test_an_include_keeps_the_metadata_of_what_it_keeps(tmp_path: Path) -> None:
    write(tmp_path / "in", [*BESIDE, ("metadata.csv", b"file_name,label\np0.jpg,x\n")])
    (row,) = account(tmp_path / "in", include=("p0.jpg",))
    assert row["label"] == "x"


def test_a_list_in_a_folder_that_is_named_too_is_read(tmp_path: Path) -> None:
    write(tmp_path / "in", [*BESIDE, ("list.txt", b"p0.jpg\n")])
    assert counts(account(tmp_path / "in", tmp_path / "in/list.txt")) == {"ok": 5, "skipped_not_image": 1}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.rar", b"Rar!\x1a\7", "RAR"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "7-Zip"),
        ("data.arrow", b"ARROW1\0\0", "Arrow"),
        ("mystery", bytes(range(256)), "unknown"),
    ],
)
def test_a_named_file_that_is_not_read_is_named_by_its_content(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    write(tmp_path, [(name, content)])
    with pytest.raises(InputError, match=says):
        account(tmp_path / name)
