"""Parquet files: which column holds images, whatever its type; labels; damaged files."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipflow_ray.errors import InputError
from tests.accounts import NAMES, PICTURES, account, codes, counts, write

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DESCRIBED = [{"bytes": content, "path": f"n{at}.jpg"} for at, content in enumerate(PICTURES)]
SMALL = [bytes([at]) * 16 for at in range(4)]


def table(path: Path, columns: dict[str, Any], metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(columns)
    if metadata is not None:
        features = {"info": {"features": metadata}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(made, path, **options)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(PICTURES, pa.binary()),
        pa.array(PICTURES, pa.large_binary()),
        pa.array(PICTURES, pa.binary_view()),
        pa.array(PICTURES, pa.binary()).dictionary_encode(),
        pa.array(DESCRIBED, STRUCT),
        pa.array([{"image": each, "box": 1} for each in DESCRIBED]),
        pa.array([{"sample": {"jpg": each, "id": 1}} for each in PICTURES]),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_images_are_found_in_columns_of_any_type(tmp_path: Path, column: pa.Array) -> None:
    found = account(table(tmp_path / "a.parquet", {"md5": SMALL, "image": column}, row_group_size=3))
    assert counts(found) == {"ok": 4}


def test_a_list_of_images_gives_a_row_for_each(tmp_path: Path) -> None:
    lists: Sequence[Any] = [[DESCRIBED[0], DESCRIBED[1]], [], None, [DESCRIBED[2], None]]
    described = account(table(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "images": lists}))
    assert [(row["member"], row["status"]) for row in described] == [
        ("0/0:n0.jpg", "ok"),
        ("0/1:n1.jpg", "ok"),
        ("1/0", "error"),
        ("2/0", "error"),
        ("3/0:n2.jpg", "ok"),
        ("3/1", "error"),
    ]
    assert codes(described) == {"empty": 3}
    plain = account(table(tmp_path / "b.parquet", {"images": [[PICTURES[0]], [PICTURES[1], PICTURES[2]]]}))
    assert [row["member"] for row in plain] == ["0/0", "1/0", "1/1"] and counts(plain) == {"ok": 3}


def test_the_image_column_is_a_described_one_before_others_and_then_one_of_images(tmp_path: Path) -> None:
    other = {"md5": SMALL, "thumb": [PICTURES[3]] * 4}
    hashes = {row["sha256"] for row in account(table(tmp_path / "a.parquet", other | {"image": DESCRIBED}))}
    assert len(hashes) == 4
    path = table(tmp_path / "b.parquet", other | {"image": list(PICTURES)})
    assert len({row["sha256"] for row in account(path)}) == 1
    assert len({row["sha256"] for row in account(path, bytes_column="image")}) == 4


def test_a_row_without_bytes_is_followed_by_its_path(tmp_path: Path) -> None:
    write(tmp_path)
    paths = [NAMES[0], str(tmp_path / NAMES[1]), f"sub/../{NAMES[2]}", "gone.jpg"]
    for name, kind in (("a", STRUCT), ("b", pa.struct([("bytes", pa.null()), ("path", pa.string())]))):
        values = pa.array([{"bytes": None, "path": path} for path in paths], kind)
        found = account(table(tmp_path / f"{name}.parquet", {"image": values}))
        assert counts(found) == {"ok": 3, "error": 1} and codes(found) == {"not_found": 1}


def test_empty_rows_are_error_rows(tmp_path: Path) -> None:
    values = pa.array([DESCRIBED[0], None, {"bytes": None, "path": None}, {"bytes": b"", "path": "a"}], STRUCT)
    found = account(table(tmp_path / "a.parquet", {"image": values}))
    assert counts(found) == {"ok": 1, "error": 3} and codes(found) == {"empty": 3}


def test_labels_are_class_names_and_nan_is_none(tmp_path: Path) -> None:
    classes = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    path = table(tmp_path / "a.parquet", {"image": DESCRIBED, "label": [1, 0, -1, None]}, classes)
    assert [row["label"] for row in account(path)] == ["dog", "cat", None, None]
    floats = table(tmp_path / "b.parquet", {"image": DESCRIBED, "Label": [1.0, float("nan"), None, 2.5]})
    assert [row["label"] for row in account(floats)] == ["1.0", None, None, "2.5"]


def test_relative_uris_start_at_the_folder_of_the_table(tmp_path: Path) -> None:
    write(tmp_path)
    path = table(tmp_path / "t/list.parq", {"URI": [f"../{name}" for name in NAMES], "label": list("abcd")})
    found = account(path)
    assert counts(found) == {"ok": 4} and [row["label"] for row in found] == list("abcd")


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({"URL": ["https://h/a.jpg"] * 2}, {"uri_column": "URL"}, "lists nothing that can be read.*https:// is not"),
        ({"image": ["text"], "label": ["x"]}, {}, "it has image, label. Set --bytes-column or --uri-column"),
        ({"image": [base64.b64encode(PICTURES[0]).decode()]}, {}, "Base64 text is not read: decode image"),
        ({"image": [PICTURES[0]], "label": ["x"]}, {"bytes_column": "imge"}, "no column 'imge'.*it has image, label"),
        ({"image": [PICTURES[0]], "label": ["x"]}, {"label_column": "lable"}, "no column 'lable'; it has image, label"),
    ],
)
def test_what_does_not_suit_a_named_table_is_refused_in_a_sentence(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        account(table(tmp_path / "a.parquet", columns), **options)


def test_a_damaged_file_is_one_error_row_and_an_empty_table_is_none(tmp_path: Path) -> None:
    whole = table(tmp_path / "in/a.parquet", {"image": list(PICTURES)}).read_bytes()
    table(tmp_path / "in/none.parquet", {"image": pa.array([], pa.binary())})
    table(tmp_path / "in/nothing.parquet", {"uri": pa.array([], pa.string())})
    write(tmp_path / "in", [("cut.parquet", whole[: len(whole) // 2]), ("zero.parquet", b""), ("t.pq", b"words")])
    found = account(tmp_path / "in")
    assert counts(found) == {"ok": 4, "error": 3} and codes(found) == {"read_failed": 3}


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"image": list(PICTURES), "label": list("abcd")}, row_group_size=2)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = account(path)
    assert counts(found) == {"ok": 2, "error": 2} and codes(found) == {"read_failed": 2}
    assert [row["label"] for row in found] == list("abcd")
