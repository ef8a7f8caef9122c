"""Lists as people write them: encodings, separators, headers, compression, relative and foreign URIs."""

import base64
import bz2
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from clipflow_ray.config import InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.listing import rows
from clipflow_ray.place import Place
from tests.accounts import NAMES, PICTURES, account, codes, counts, write

LINES = "\r\n".join(NAMES)
CSV = "uri,label\n" + "".join(f"{name},x\n" for name in NAMES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", b"\xef\xbb\xbf" + LINES.encode()),
        ("list.txt", LINES.encode("utf-16")),
        ("list.txt", b"# my list\n p0.jpg \n\np1.jpg\t\n  p2.jpg\np3.jpg"),
        ("list", LINES.encode()),
        ("LIST.LST", LINES.encode()),
        ("list.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("list.csv", CSV.encode("utf-16")),
        ("list.csv", CSV.replace(",", ";").encode()),
        ("list.csv", CSV.replace("uri,label", " URI , Label").encode()),
        ("list.csv", CSV.replace("x\n", '"two\r\nlines, ""quoted"""\n').encode()),
        ("list.csv", CSV.replace("x\n", "a\0b\n", 1).encode()),
        ("list.csv", CSV.replace("x\n", "word " * 40_000 + "\n").encode()),
        ("list.tsv", CSV.replace(",", "\t").encode()),
        ("list.json", json.dumps([{"uri": name} for name in NAMES], indent=1).encode()),
        ("list.json", json.dumps(list(NAMES)).encode()),
        ("list.json", "\n".join(json.dumps({"uri": name}) for name in NAMES).encode()),
        ("list.jsonl", ("\ufeff" + "\n".join(json.dumps({"URI": name}) for name in NAMES)).encode()),
        ("list.txt.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("list.txt.gz", gzip.compress(LINES[:9].encode(), mtime=0) + gzip.compress(LINES[9:].encode(), mtime=0)),
        ("list.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("list.csv.bz2", bz2.compress(CSV.encode())),
        ("list.csv.xz", lzma.compress(CSV.encode())),
        ("list.jsonl.zst", pa.compress(json.dumps({"uri": "p0.jpg"}).encode(), "zstd", asbytes=True)),
    ],
)
def test_a_list_is_read_as_it_comes(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path)
    write(tmp_path, [(name, content)])
    assert counts(account(tmp_path / name)) == {"ok": 1 if name.endswith("zst") else 4}


def test_labels_keep_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "l.csv").write_text('uri, LABEL\np0.jpg,"a, b"\np1.jpg,"two\nlines"\np2.jpg,"say ""hi"""\np3.jpg,\n')
    assert [row["label"] for row in account(tmp_path / "l.csv")] == ["a, b", "two\nlines", 'say "hi"', None]


def test_uris_may_be_relative_absolute_or_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "with space")
    lines = [
        "../with space/p0.jpg",
        "./../lists/../with space/p1.jpg",
        f"{tmp_path}/with space/p2.jpg",
        f"file://{tmp_path}/with%20space/p3.jpg",
        "~/with space/p0.jpg",
        "..\\with space\\p1.jpg",
    ]
    write(tmp_path / "lists", [("list.txt", "\n".join(lines).encode())])
    found = account(tmp_path / "lists/list.txt")
    assert counts(found) == {"ok": 6}
    assert all(".." not in row["uri"] and row["uri"].startswith("/") for row in found)


def test_a_name_with_a_backslash_is_that_name_if_there_is_such_a_file(tmp_path: Path) -> None:
    write(tmp_path, [("a\\b.jpg", PICTURES[0]), ("list.txt", b"a\\b.jpg\n")])
    assert counts(account(tmp_path / "list.txt")) == {"ok": 1}


def test_blank_cells_and_foreign_uris_among_others_are_error_rows_that_say_why(tmp_path: Path) -> None:
    write(tmp_path)
    text = "uri,label\np0.jpg,1\n,2\n  ,3\nhttps://example.org/a.jpg,4\ngs://b/a.jpg,5\nfile://host/a.jpg,6\n"
    (tmp_path / "list.csv").write_text(text + f"{base64.b64encode(PICTURES[0]).decode()},7\n")
    found = account(tmp_path / "list.csv")
    assert counts(found) == {"ok": 1, "error": 6} and codes(found) == {"bad_uri": 6}
    says = ("empty", "empty", "https://", "gs://", "file://", "base64")
    for number, (row, word) in enumerate(zip(found[1:], says, strict=True), 2):
        assert word in row["error_message"] and f"list.csv, record {number}" in row["error_message"]
        assert row["label"] == str(number) and len(row["uri"]) <= 200


@pytest.mark.parametrize("scheme", ["https", "http", "gs", "hf", "s3a", "abfs"])
def test_a_list_of_foreign_uris_alone_is_refused_once_with_its_name(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "list.txt").write_text(f"{scheme}://host/a.jpg\n" * 3)
    with pytest.raises(InputError, match=rf"list\.txt lists nothing that can be read.*{scheme}:// is not read"):
        account(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        ("l.csv", "path,label\na.jpg,x\n", {}, "no column 'uri'; it has path, label. Set --uri-column"),
        ("l.tsv", "path\tlabel\na.jpg\tx\n", {}, "no column 'uri'; it has path, label"),
        ("l.csv", CSV, {"label_column": "lable"}, "no column 'lable'; it has uri, label. Set --label-column"),
        ("l.csv", CSV, {"group_column": "site"}, "no column 'site'; it has uri, label. Set --group-column"),
        ("l.jsonl", '{"image": "a.jpg", "label": 1}\n', {}, "no column 'uri'; it has image, label. Set --uri-column"),
        ("l.jsonl", '{"uri": "a.jpg"}\n', {"label_column": "lable"}, "no column 'lable'; it has uri"),
        ("l.json", '{"images": [{"file_name": "a.jpg"}]}', {}, "no column 'uri'; it has images"),
        ("l.json", "[1, 2]", {}, "Entry 1 is not a JSON object"),
    ],
)
def test_a_missing_column_is_named_together_with_those_that_exist(
    tmp_path: Path, name: str, text: str, options: dict[str, str], says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        account(tmp_path / name, **options)


def test_a_bad_line_among_others_is_an_error_row(tmp_path: Path) -> None:
    write(tmp_path)
    lines = ['{"uri": "p0.jpg"}', "{broken", '{"label": 1}', "[1]", '{"uri": "p\\ud800.jpg"}', '{"uri": "p1.jpg"}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    found = account(tmp_path / "list.jsonl")
    assert [row["status"] for row in found] == ["ok", "error", "error", "error", "error", "ok"]
    assert "Line 2 is not JSON" in found[1]["error_message"]


def test_a_list_that_breaks_off_gives_its_rows_and_an_error_row(tmp_path: Path) -> None:
    names = [hashlib.sha256(str(at).encode()).hexdigest() for at in range(9_000)]  # they hardly shrink
    whole = gzip.compress("\n".join(["p0.jpg", *names]).encode())
    (tmp_path / "list.txt.gz").write_bytes(whole[: len(whole) // 2])
    found = list(rows([Place.at(tmp_path / "list.txt.gz")], InventoryOptions()))
    assert [row["problem"] for row in found[:-1]] == [None] * (len(found) - 1) and len(found) > 1000
    assert "does not read on" in found[-1]["problem"]
