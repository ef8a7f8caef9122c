"""The same images in every kind of input: as files, lists, parquet, tar shards and imagefolders, on disk and on S3."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipflow_ray.audit.record import AuditRecord
from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig, InventoryOptions
from clipflow_ray.errors import InputError
from clipflow_ray.inputs.format import Row
from clipflow_ray.inputs.listing import sources
from clipflow_ray.inputs.manifest import write_manifest
from clipflow_ray.place import Place
from tests.accounts import tar, write
from tests.conftest import encoded, photo, s3_client

IMAGES = {f"{label}/{at} +%2F'.jpg": encoded(photo(3000 + at)) for at, label in enumerate(("cat", "dog") * 4)}


def ledger(record: AuditRecord) -> list[Row]:
    rows: list[Row] = pq.read_table(record.ledger).to_pylist()
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, data in IMAGES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def reference(cluster: None, trained: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Score by sha256, from an audit of plain files."""
    output = str(tmp_path_factory.mktemp("reference") / "run")
    record = audit(AuditConfig(input=(str(folder),), output=output, checkpoint=trained, alpha=0.1))
    return {row["sha256"]: row["score"] for row in ledger(record)}


def written_as(kind: str, folder: Path, root: Path) -> Path:
    """The same images as another kind of input; returns what to name as the input."""
    if kind in ("txt", "csv", "jsonl"):
        path, uris = root / f"list.{kind}", [f"{folder}/{name}" for name in IMAGES]
        lines = {
            "txt": uris,
            "csv": ["uri,label", *(f'"{uri}",{uri.split("/")[-2]}' for uri in uris)],
            "jsonl": [json.dumps({"uri": uri, "label": uri.split("/")[-2]}) for uri in uris],
        }[kind]
        path.write_text("\n".join(lines))
        return path
    if kind == "parquet":
        rows = [{"bytes": data, "path": name} for name, data in IMAGES.items()]
        labels = [name.split("/")[0] for name in IMAGES]
        pq.write_table(pa.table({"label": labels, "image": rows}), root / "data.parquet", row_group_size=3)
        return root / "data.parquet"
    with tarfile.open(root / "shard.tar", "w") as archive:
        for name, data in IMAGES.items():
            for member, content in ((name, data), (f"{name[:-4]}.json", b"{}")):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return root / "shard.tar"


def test_every_kind_of_input_gives_the_scores_of_the_files(
    reference: dict[str, float], trained: str, folder: Path, s3: Place, tmp_path: Path
) -> None:
    """One audit of several inputs, which are on disk and on s3."""
    client = s3_client(s3)
    client.create_bucket(Bucket="inputs")
    kinds = ("txt", "csv", "jsonl", "parquet", "tar")
    files = {kind: written_as(kind, folder, tmp_path) for kind in kinds}
    for kind in ("txt", "parquet", "tar"):
        client.put_object(Bucket="inputs", Key=f"{kind}/{files[kind].name}", Body=files[kind].read_bytes())
    stored = {kind: f"s3://inputs/{kind}/{files[kind].name}" for kind in ("txt", "parquet", "tar")}
    on_disk = {kind: str(path) for kind, path in files.items() if kind != "txt"}
    sources = (*on_disk.values(), *stored.values())
    config = AuditConfig(input=sources, output=str(tmp_path / "run"), checkpoint=trained, alpha=0.1, s3=s3.options)
    listed_rows = ledger(audit(config))
    rows = [row for row in listed_rows if row["status"] == "ok"]
    assert Counter(row["status"] for row in listed_rows)["skipped_not_image"] == 2 * len(IMAGES)  # json in two tars
    assert len({row["row_id"] for row in listed_rows}) == len(listed_rows) == len(rows) + 2 * len(IMAGES)
    assert len(rows) == len(IMAGES) * len(sources)
    assert all(row["score"] == pytest.approx(reference[row["sha256"]], rel=1e-5) for row in rows)
    containers = {"tar": on_disk["tar"], "parquet": on_disk["parquet"]} | {
        f"stored {kind}": stored[kind] for kind in ("tar", "parquet")
    }
    for kind, uri in containers.items():
        own = [row for row in rows if row["uri"] == uri]
        labels = {"cat": 4, "dog": 4} if "parquet" in kind else {None: 8}
        assert Counter(row["label"] for row in own) == labels
    listed = [row for row in rows if row["uri"].startswith(str(folder))]
    assert Counter(row["label"] for row in listed) == {"cat": 8, "dog": 8, None: 8}  # the text list has no labels


def test_an_imagefolder_passes_its_labels_through(
    reference: dict[str, float], trained: str, folder: Path, tmp_path: Path
) -> None:
    options = InventoryOptions(input_format="hf")
    config = AuditConfig(
        input=(str(folder),), output=str(tmp_path / "run"), checkpoint=trained, alpha=0.1, inventory=options
    )
    rows = ledger(audit(config))
    assert all(row["label"] == row["uri"].split("/")[-2] for row in rows)
    assert {row["sha256"]: row["score"] for row in rows} == pytest.approx(reference, rel=1e-5)


@pytest.mark.stress  # a cluster of its own takes a minute
def test_one_line_in_the_registry_adds_a_format_to_audits(
    reference: dict[str, float], trained: str, tmp_path: Path
) -> None:
    """In a cluster of its own, whose workers register the format as the driver does."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/all.hex").write_text("\n".join(data.hex() for data in IMAGES.values()))
    code = (
        "import sys, ray\nfrom clipflow_ray.cli import main\nfrom tests import hex_format\nhex_format.register()\n"
        "ray.init(address='local', num_cpus=4, include_dashboard=False, log_to_driver=False,"
        " runtime_env={'worker_process_setup_hook': 'tests.hex_format.register'})\n"
        "main(['audit', '--input', sys.argv[1], '--output', sys.argv[2], '--checkpoint', sys.argv[3],"
        " '--alpha', '0.1'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "run"), trained]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = ledger(AuditRecord.model_validate_json((tmp_path / "run/run.json").read_text()))
    assert {row["sha256"]: row["score"] for row in rows} == pytest.approx(reference, rel=1e-5)
    assert {row["group"] for row in rows} == {"toy"}


def test_a_list_with_repeats_missing_files_and_bad_uris_gives_a_row_for_each_line(
    reference: dict[str, float], trained: str, folder: Path, tmp_path: Path
) -> None:
    good = [f"{folder}/{name}" for name in IMAGES]
    lines = [good[0], good[1], good[0], "absent.jpg", "http://host/x.jpg", "../x.jpg", good[0]]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    config = AuditConfig(
        input=(str(tmp_path / "list.txt"),), output=str(tmp_path / "run"), checkpoint=trained, alpha=0.1
    )
    record = audit(config.model_copy(update={"dedupe": "sha256"}))
    rows = ledger(record)
    assert len({row["row_id"] for row in rows}) == len(rows) == len(lines)
    assert record.by_status == {"error": 3, "ok": 2, "skipped_duplicate": 2}
    assert record.by_error_code == {"bad_uri": 1, "not_found": 2}
    first = {row["row_id"] for row in rows if row["uri"] == good[0] and row["dup_of"] is None}
    repeats = [row for row in rows if row["dup_of"]]
    assert {row["dup_of"] for row in repeats} == first and len(repeats) == 2
    assert all(row["verdict"] is None and row["q_value"] is None for row in repeats)
    assert record.flagged.of == 2


def test_prefixes_on_s3_are_listed_apart_and_nothing_is_lost(cluster: None, s3: Place, tmp_path: Path) -> None:
    client = s3_client(s3)
    client.create_bucket(Bucket="prefixes")
    keys = [
        f"in/{folder}/{name}" for folder in ("a", "b c", "ünï", "a//x") for name in ("1.jpg", "2+%2F.jpg", "é'.jpg")
    ]
    for key in [*keys, "in/.hidden/x.jpg", "other/y.jpg"]:
        client.put_object(Bucket="prefixes", Key=key, Body=b"x")
    assert len(sources([s3.with_uri("s3://prefixes/in/")], InventoryOptions(input_format="images"))) == 3
    count = write_manifest([s3.with_uri("s3://prefixes/in/")], Place.at(tmp_path / "m"))
    rows = pq.read_table(tmp_path / "m").to_pylist()
    assert count == len(rows) and sorted(row["uri"] for row in rows) == sorted(f"s3://prefixes/{key}" for key in keys)
    assert {row["group"] for row in rows} == {"a", "b c", "ünï"}


def test_a_listing_made_again_after_the_input_shrank_leaves_no_old_part(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("one", "two"):
        (tmp_path / f"{part}.txt").write_text("/a.jpg\n/b.jpg\n")
    root, manifest = Place.at(tmp_path), tmp_path / "manifest"
    assert write_manifest([root / "one.txt", root / "two.txt"], root / "manifest") == 4
    (manifest / "mine.txt").write_text("kept")
    assert write_manifest([root / "one.txt"], root / "manifest") == 2
    assert sorted(path.name for path in manifest.iterdir()) == ["mine.txt", "part-00000-00000.parquet"]


def test_inputs_that_hold_nothing_to_read_are_refused_in_one_sentence_before_work(
    cluster: None, tmp_path: Path
) -> None:
    (tmp_path / "broken.tar").write_bytes(b"this is not a tar" * 100)
    with pytest.raises(InputError, match=r"hold no images: read_failed: broken\.tar is not what its name says"):
        write_manifest([Place.at(tmp_path / "broken.tar")], Place.at(tmp_path / "m"))
    write(tmp_path / "words", [("a.txt", b"x"), ("b.md", b"x")])
    with pytest.raises(InputError, match=r"hold no images: Files whose names end in \.txt are no pictures"):
        write_manifest([Place.at(tmp_path / "words")], Place.at(tmp_path / "m"))


def test_a_mixed_folder_is_audited_whole_and_exported(
    cluster: None, trained: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures, captions, a compressed shard, a broken one and a hidden file, through an audit."""
    data = list(IMAGES.values())
    write(tmp_path / "in", [("a.jpg", data[0]), ("a.txt", b"words"), ("broken.tar", b""), (".hidden.jpg", data[1])])
    tar(tmp_path / "in/s.tar.gz", [(f"{at}.jpg", content) for at, content in enumerate(data)], "w:gz")
    config = AuditConfig(
        input=(str(tmp_path / "in"),), output=str(tmp_path / "run"), checkpoint=trained, alpha=0.1, export="csv-all"
    )
    with caplog.at_level(logging.INFO):
        record = audit(config)
    assert record.by_status == {"error": 1, "ok": len(data) + 1, "skipped_not_image": 1}
    assert record.by_error_code == {"read_failed": 1} and record.error_rate == 1 / (len(data) + 2)
    assert "input: 8 rows as tarstream, 2 rows as images, 1 rows as webdataset" in caplog.text
    assert "left out: 1 hidden files or folders (leading dot)" in caplog.text
    assert record.exported == str(tmp_path / "run/ledger.csv")
    with open(record.exported, encoding="utf-8", newline="") as file:
        exported = {row["row_id"]: row for row in csv.DictReader(file)}
    assert {key: row["status"] for key, row in exported.items()} == {
        row["row_id"]: row["status"] for row in ledger(record)
    }


class Endless(BaseHTTPRequestHandler):
    """A bucket that lists a thousand pages of a thousand keys."""

    PAGES, KEYS = 1000, 1000

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        at = int(query.get("continuation-token", ["0"])[0])
        items = "".join(
            f"<Contents><Key>in/{at:04d}/{number:04d}.jpg</Key><Size>9</Size><ETag>&quot;e&quot;</ETag></Contents>"
            for number in range(self.KEYS)
        )
        last = at + 1 >= self.PAGES
        more = (
            "<IsTruncated>false</IsTruncated>"
            if last
            else (f"<IsTruncated>true</IsTruncated><NextContinuationToken>{at + 1}</NextContinuationToken>")
        )
        body = f"<ListBucketResult>{more}{items}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.stress
@pytest.mark.parametrize("where", ["list", "s3"])
def test_a_million_keys_become_a_manifest_in_bounded_driver_memory(tmp_path: Path, where: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source, endpoint = "s3://endless/in/", f"http://127.0.0.1:{server.server_port}"
    if where == "list":
        source = str(tmp_path / "list.txt")
        Path(source).write_text("".join(f"s3://b/in/{at:07d}.jpg\n" for at in range(Endless.PAGES * Endless.KEYS)))
    code = (
        "import sys, resource\nfrom clipflow_ray.config import AuditConfig\nfrom clipflow_ray.data import resources\n"
        "from clipflow_ray.place import places\n"
        "from clipflow_ray.inputs.manifest import write_manifest\nresources.connect()\n"
        "s3 = {'endpoint_url': sys.argv[3], 'region': 'us-east-1', 'unsigned': True}\n"
        "source, manifest = places(sys.argv[1:3], AuditConfig(output='', s3=s3).s3)\n"
        "print(write_manifest([source], manifest), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, source, str(tmp_path / "manifest"), endpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    server.shutdown()
    server.server_close()
    count, peak = map(int, done.stdout.split())
    ids = pq.read_table(tmp_path / "manifest", columns=["row_id"])["row_id"]
    assert count == len(ids) == len(ids.unique()) == Endless.PAGES * Endless.KEYS
    assert peak < 1.5 * 2**20, f"the driver took {peak // 1024} MiB"
