"""Tar and zip archives: what each member becomes, and what a damaged archive costs."""

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from clipflow_ray.config import ImageLimits, InventoryOptions
from clipflow_ray.inputs.listing import rows
from clipflow_ray.inputs.reading import read_row
from clipflow_ray.place import Place
from tests.accounts import BESIDE, PICTURES, account, codes, counts, tar, write

MIXED = (
    ("a/000.jpg", PICTURES[0]),
    ("a/000.json", b"{}"),
    ("a/000.cls", b"1"),
    ("b/1.0.JPG", PICTURES[1]),
    ("0.img", PICTURES[2]),
    ("1", PICTURES[3]),
    ("notes", b"words"),
    ("._a.jpg", b"\0\5\x16\7"),
    ("__MACOSX/a.jpg", b"\0\5\x16\7"),
    ("c.tga", b"not decoded"),
    ("d/" + "é" * 120 + ".png", PICTURES[0]),
    ("a/000.jpg", PICTURES[1]),
    ("empty.jpg", b""),
)


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst", "tgz", "zip"])
def test_an_archive_comes_to_what_a_folder_with_the_same_files_comes_to(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"in/a.{kind}"
    if kind == "folder":
        write(path, MIXED)
    elif kind == "zip":
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, pytest.warns(UserWarning, match="Duplicate"):
            for name, content in MIXED:
                archive.writestr(name, content)
    else:
        tar(path, MIXED, {"tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(kind, "w"))
        if kind == "tar.zst":
            path.write_bytes(pa.compress(path.read_bytes(), "zstd", asbytes=True))
    found = account(tmp_path / "in")
    repeated = 0 if kind == "folder" else 1  # a folder holds a name once
    assert counts(found) == {"ok": 5 + repeated, "skipped_not_image": 5, "error": 2}
    assert codes(found) == {"unsupported_format": 1, "empty": 1}
    assert counts(account(path)) == counts(found)  # named itself


def test_the_members_of_a_compressed_tar_are_read_in_any_order(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", [(f"{at}.jpg", bytes([at]) * 100_000) for at in range(9)], "w:gz")
    place, options = Place.at(path), InventoryOptions()
    listed = list(rows([place], options))
    assert {row["input_format"] for row in listed} == {"tarstream"}
    for at in (3, 4, 8, 0, 7, 7, 2):
        assert read_row(listed[at], place, options, ImageLimits()) == bytes([at]) * 100_000


def test_links_in_a_tar_are_the_pictures_that_they_name(tmp_path: Path) -> None:
    path = tar(tmp_path / "in/a.tar")
    with tarfile.open(path, "a") as archive:
        for name, target, kind in (
            ("hard.jpg", "p0.jpg", tarfile.LNKTYPE),
            ("sub/soft.jpg", "../p1.jpg", tarfile.SYMTYPE),
            ("gone.jpg", "nowhere.jpg", tarfile.SYMTYPE),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    found = account(tmp_path / "in")
    assert counts(found) == {"ok": 6, "error": 1} and codes(found) == {"not_found": 1}
    hashes = {row["member"]: row["sha256"] for row in found}
    assert hashes["hard.jpg"] == hashes["p0.jpg"] and hashes["sub/soft.jpg"] == hashes["p1.jpg"]


def test_a_member_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        member = tarfile.TarInfo(os.fsdecode(b"caf\xe9.jpg"))
        member.size = len(PICTURES[0])
        archive.addfile(member, io.BytesIO(PICTURES[0]))
    (row,) = account(path)
    assert row["status"] == "ok" and row["member"] == "caf\\udce9.jpg"


@pytest.mark.parametrize(
    ("damage", "ok", "says"),
    [
        ("cut within a member", 1, "after 2 members"),
        ("cut between members", 2, "cut off after 2 members"),
        ("a header overwritten", 2, "damaged after 2 members"),
        ("a second archive behind", 4, "more behind its end marker"),
        ("no byte", 0, "empty"),
        ("text", 0, "text"),
    ],
)
def test_a_damaged_shard_is_one_error_row_beside_what_it_still_holds(
    tmp_path: Path, damage: str, ok: int, says: str
) -> None:
    whole = tar(tmp_path / "in/a.tar").read_bytes()
    sizes = [512 + -(-len(content) // 512) * 512 for _, content in BESIDE]
    two = sum(sizes[:2])
    (tmp_path / "in/b.tar").write_bytes(
        {
            "cut within a member": whole[: two - 600],
            "cut between members": whole[:two],
            "a header overwritten": whole[:two] + b"\1" * 512 + whole[two + 512 :],
            "a second archive behind": whole + whole,
            "no byte": b"",
            "text": b"not a tar at all\n" * 99,
        }[damage]
    )
    found = account(tmp_path / "in")
    assert counts(found)["ok"] == 4 + ok
    (row,) = [row for row in found if row["error_code"] == "read_failed"]
    assert row["uri"].endswith("b.tar") and row["member"] == "" and says in row["error_message"]
    assert len(found) - 5 - ok == (damage == "cut within a member")  # that member has a row too


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])
def test_a_compressed_shard_that_is_cut_off_is_an_error_row_and_its_members_are_read(tmp_path: Path, kind: str) -> None:
    tar(tmp_path / "in/a.tar")
    members = [(f"{at}.png", os.urandom(50_000)) for at in range(8)]
    path = tar(tmp_path / f"in/b.{kind}", members, "w:gz" if kind == "tar.gz" else "w")
    if kind == "tar.zst":
        path.write_bytes(pa.compress(path.read_bytes(), "zstd", asbytes=True))
    path.write_bytes(path.read_bytes()[:230_000])
    found = account(tmp_path / "in")
    assert counts(found)["ok"] == 4
    (row,) = [row for row in found if row["error_code"] == "read_failed" and row["member"] == ""]
    assert "does not decompress to a tar after" in row["error_message"]
    assert sum(row["uri"].endswith(kind) for row in found) >= 4


@pytest.mark.parametrize("damage", ["cut", "encrypted", "checksum"])
def test_a_damaged_zip_costs_only_what_is_damaged(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in/a.zip", "w") as archive:
        for name, content in BESIDE:
            archive.writestr(name, content)
    data = bytearray((tmp_path / "in/a.zip").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "encrypted":
        at = data.index(b"PK\1\2") + 8  # the flags of the first member, in the directory and before its data
        for position in (at, 6):
            struct.pack_into("<H", data, position, 1)
    else:
        data[200] ^= 255
    (tmp_path / "in/a.zip").write_bytes(data)
    found = account(tmp_path / "in")
    assert counts(found) == {"ok": 4 if damage == "cut" else 7, "error": 1} and codes(found) == {"read_failed": 1}


def test_a_member_larger_than_allowed_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(70 * 2**20))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz", compresslevel=1) as tarball:
        member = tarfile.TarInfo("a.png")
        member.size = 70 * 2**20
        tarball.addfile(member, io.BytesIO(bytes(member.size)))
    for name in ("bomb.zip", "bomb.tar.gz"):
        assert codes(account(tmp_path / name)) == {"too_large_bytes": 1}
