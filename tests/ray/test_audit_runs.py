"""Audits of many objects: samples, duplicates, leases, progress, the report and exit codes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright

from clipflow_ray.audit import progress
from clipflow_ray.audit.record import AuditRecord, AuditReport
from clipflow_ray.audit.run import audit, judge_again, plan
from clipflow_ray.cli import main
from clipflow_ray.columns import manifest_table
from clipflow_ray.config import AuditConfig, ImageLimits, InventoryOptions
from clipflow_ray.errors import InputError, RunConflictError
from clipflow_ray.inputs.format import Row
from clipflow_ray.inputs.listing import rows
from clipflow_ray.inputs.reading import read_bytes
from clipflow_ray.place import Place
from clipflow_ray.runs import lease
from tests.conftest import encoded, photo, s3_client

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def config(trained: str, tmp_path_factory: pytest.TempPathFactory) -> AuditConfig:
    root = tmp_path_factory.mktemp("many")
    for at in range(48):
        folder = root / f"site-{at % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{at}.jpg").write_bytes(encoded(photo(4000 + at % 40, (230, 240 + 20 * (at % 40 % 3)))))
    (root / "site-0" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    output = str(tmp_path_factory.mktemp("run") / "run")
    return AuditConfig(input=(str(root),), output=output, checkpoint=trained, alpha=0.1, gallery=4)


@pytest.fixture(scope="module")
def record(cluster: None, config: AuditConfig) -> AuditRecord:
    return audit(config)


def ledger(output: str) -> dict[str, Row]:
    return {row["row_id"]: row for row in pq.read_table(f"{output}/ledger").to_pylist()}


def test_a_sample_is_the_same_in_every_run_and_a_larger_one_holds_a_smaller_one(
    record: AuditRecord, config: AuditConfig, tmp_path: Path
) -> None:
    def sampled(share: float, name: str) -> dict[str, Row]:
        audit(config.model_copy(update={"sample": share, "output": str(tmp_path / name)}))
        return ledger(str(tmp_path / name))

    whole, small, again, large = ledger(config.output), sampled(0.3, "a"), sampled(0.3, "b"), sampled(0.6, "c")
    chosen = [{k for k, row in rows.items() if row["status"] != "skipped_sample"} for rows in (small, again, large)]
    assert chosen[0] == chosen[1] < chosen[2] < set(whole)
    assert set(small) == set(whole)
    skipped = [row for key, row in small.items() if key not in chosen[0]]
    assert all(row["score"] is None and row["verdict"] is None and row["sha256"] is None for row in skipped)
    for key in chosen[0]:
        if whole[key]["score"] is not None:
            assert small[key]["score"] == pytest.approx(whole[key]["score"], rel=1e-5)


def test_judging_again_needs_no_encoder_and_counts_equal_files_once(record: AuditRecord, config: AuditConfig) -> None:
    assert record.by_status == {"error": 1, "ok": 48}
    code = (
        "import sys; from clipflow_ray.model import encoder; from clipflow_ray.cli import main\n"
        "def refuse(*_, **__): raise AssertionError('an encoder was built')\n"
        "encoder.Encoder.__init__ = refuse\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "finalize", "--output", config.output, "--json"]
    command += ["--alpha", "0.2", "--dedupe", "sha256"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wider = json.loads(done.stdout)
    assert wider["alpha"] == 0.2 and wider["by_status"] == {"error": 1, "ok": 40, "skipped_duplicate": 8}
    assert wider["flagged"]["of"] == 40
    assert judge_again(AuditConfig(output=config.output, alpha=0.1, dedupe="none")).flagged == record.flagged


def test_a_judgement_that_was_cut_off_is_repeated(record: AuditRecord, config: AuditConfig) -> None:
    """As if a call at another alpha had been killed while it wrote the ledger."""
    before = ledger(config.output)
    Path(config.output, "_SUCCESS").unlink()
    for file in Path(config.output, "ledger").iterdir():
        file.write_bytes(b"")
    assert judge_again(AuditConfig(output=config.output)) == record
    assert ledger(config.output) == before and Path(config.output, "_SUCCESS").exists()


def test_judging_again_shows_pictures_from_the_store_that_the_audit_named(
    cluster: None, config: AuditConfig, s3: Place, tmp_path: Path
) -> None:
    client = s3_client(s3)
    client.create_bucket(Bucket="pictures")
    for at in range(8):
        client.put_object(Bucket="pictures", Key=f"in/{at}.jpg", Body=encoded(photo(4100 + at)))
    output = str(tmp_path / "run")
    audit(config.model_copy(update={"input": ("s3://pictures/in/",), "output": output, "s3": s3.options}))
    again = judge_again(AuditConfig(output=output, alpha=0.2))
    assert Path(again.report).read_text().count("data:image/jpeg;base64,") >= 4


def test_an_output_without_a_finished_audit_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished audit"):
        judge_again(AuditConfig(output=str(tmp_path), alpha=0.1))


def test_a_second_run_on_the_same_output_is_refused_while_the_first_holds_it(tmp_path: Path) -> None:
    with lease.exclusive(Place.at(tmp_path / "out")):
        with pytest.raises(RunConflictError, match="Another run"), lease.exclusive(Place.at(tmp_path / "out")):
            pass
        with lease.exclusive(Place.at(tmp_path / "other")):
            pass
    with lease.exclusive(Place.at(tmp_path / "out")):
        pass


def test_on_s3_the_lease_of_a_live_run_is_kept_and_that_of_a_dead_run_is_taken_over(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    client = s3_client(s3)
    client.create_bucket(Bucket="leases")
    output = s3.with_uri("s3://leases/out")
    with (
        lease.exclusive(output),
        pytest.raises(RunConflictError, match="process"),
        lease.exclusive(output),
    ):
        pass
    assert "Contents" not in client.list_objects_v2(Bucket="leases")
    dead = lease._ObjectLease(output)
    dead.take()
    with lease.exclusive(output):
        threading.Event().wait(0.5)
        dead.release()  # too late: another run holds the lease
        assert client.list_objects_v2(Bucket="leases")["KeyCount"] == 1


def test_a_run_whose_lease_was_taken_over_stops_and_leaves_the_output_to_the_other(
    cluster: None, config: AuditConfig, s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    client = s3_client(s3)
    client.create_bucket(Bucket="taken")
    other = lease._ObjectLease(s3.with_uri("s3://taken/out"))

    def take_over() -> None:
        """Once rows are written, take the lease as a run does that found it not renewed."""
        while not client.list_objects_v2(Bucket="taken", Prefix="out/scored/").get("KeyCount"):
            time.sleep(0.05)
        taken = False
        while not taken:  # repeat if the run renewed the lease in between
            holder = other._holder()
            assert holder is not None
            taken = other._put(holder.etag)

    taking = threading.Thread(target=take_over)
    taking.start()
    settings = config.model_copy(update={"output": "s3://taken/out", "s3": s3.options, "gallery": 0})
    with pytest.raises(RunConflictError, match=f"process {os.getpid()}.*took s3://taken/out over.*stopped"):
        audit(settings.model_copy(update={"rows_per_task": 2, "batch_size": 2}))
    taking.join()
    keys = {item["Key"] for item in client.list_objects_v2(Bucket="taken")["Contents"]}
    assert "out/.lease" in keys and "out/_SUCCESS" not in keys
    other.release()
    assert audit(settings).rows == 49


def test_a_renewal_whose_answer_was_lost_is_no_takeover(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    s3_client(s3).create_bucket(Bucket="answers")
    held = lease._ObjectLease(s3.with_uri("s3://answers/out"))
    held.take()
    before = held._etag
    assert held._put(before)
    held._etag = before  # as if the store's answer had been lost
    stop = threading.Event()
    renewing = threading.Thread(target=held.renew_until, args=(stop, stop.set))
    renewing.start()
    time.sleep(0.5)
    assert not stop.is_set() and not held.lost
    stop.set()
    renewing.join()
    held.release()
    assert "Contents" not in s3_client(s3).list_objects_v2(Bucket="answers")


def test_an_object_that_changed_after_it_was_listed_has_its_own_code(
    cluster: None, config: AuditConfig, s3: Place
) -> None:
    client = s3_client(s3)
    client.create_bucket(Bucket="changing")
    client.put_object(Bucket="changing", Key="in/a.jpg", Body=encoded(photo(1)))
    listed = rows([s3.with_uri("s3://changing/in/")], InventoryOptions(input_format="images"))
    manifest = manifest_table(list(listed))
    client.put_object(Bucket="changing", Key="in/a.jpg", Body=encoded(photo(2)))
    (outcome,) = read_bytes(manifest, s3, ImageLimits())
    assert not isinstance(outcome, bytes) and outcome.item_code == "changed"


def test_the_plan_counts_objects_and_bytes_and_writes_nothing(
    cluster: None, config: AuditConfig, tmp_path: Path
) -> None:
    planned = plan(config.model_copy(update={"output": str(tmp_path / "run"), "sample": 0.5}))
    assert planned.objects == 49 and planned.by_suffix == {".jpg": 49}
    assert planned.bytes == sum(path.stat().st_size for path in Path(config.input[0]).rglob("*.jpg"))
    assert planned.hours > 0 and not (tmp_path / "run").exists()


def test_progress_is_written_beside_the_ledger(record: AuditRecord, config: AuditConfig) -> None:
    state = json.loads(Path(config.output, progress.PROGRESS).read_text())
    assert (state["done"], state["total"], state["errors"]) == (49, 49, {"truncated": 1})


def test_the_report_is_one_file_with_the_facts_of_the_record(record: AuditRecord, config: AuditConfig) -> None:
    page = Path(record.report).read_text()
    facts = AuditReport.model_validate_json(Path(config.output, "report.json").read_text())
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:|["'#])[^>\s]*""", page)
    assert facts.flagged == record.flagged
    assert sum(row.of for row in facts.groups) == 48 == sum(row.of for row in facts.strata)
    assert {row.name for row in facts.groups} == {"site-0", "site-1", "site-2"}
    assert page.count("data:image/jpeg;base64,") == 8
    assert facts.errors["truncated"].examples[0].place.endswith("broken.jpg")
    assert sum(facts.p_values) == 48
    words = shlex.split(facts.command)
    assert words[:4] == ["clipflow-ray", "audit", "--input", config.input[0]] and words[-2:] == ["--gallery", "4"]
    text = Path(config.output, "report.md").read_text()
    assert "not proof" in text and "| site-0 |" in text


def test_an_error_and_a_failed_gate_have_different_exit_codes(
    record: AuditRecord, config: AuditConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record.error_rate == pytest.approx(1 / 49)
    assert record.flagged.count > 0
    arguments = ["audit", "--input", config.input[0], "--output", config.output]
    arguments += ["--checkpoint", config.checkpoint, "--alpha", "0.1"]
    for flags, code in (([], 0), (["--max-error-rate", "0.001"], 3), (["--fail-if-flag-rate-above", "0.0"], 4)):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *flags])
        assert ended.value.code == code
        assert "flagged at alpha 0.1" in capsys.readouterr().out


def test_sigterm_ends_a_run_with_a_sentence_and_the_next_run_resumes(config: AuditConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "clipflow_ray", "audit", "--input", config.input[0], "--output", str(output)]
    command += ["--checkpoint", config.checkpoint, "--alpha", "0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        deadline = time.monotonic() + 180
        while not (output / "run.json").exists() and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.terminate()
        _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1 and "error [terminated]" in errors and "Traceback" not in errors
    assert not (output / "_SUCCESS").exists()
    result = audit(config.model_copy(update={"output": str(output), "gallery": 24}))
    assert result.rows == 49


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's `chromium` to test the report's page")
def test_the_report_fits_a_phone_sorts_its_tables_and_sends_no_request(record: AuditRecord) -> None:
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: None if request.url[:5] in ("file:", "data:") else problems.append(request.url)
        )
        page.goto(f"file://{record.report}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        names = page.locator("table").first.locator("tbody tr td:first-child")
        page.get_by_role("button", name="name").first.click()
        assert names.all_inner_texts() == ["site-2", "site-1", "site-0"]
        page.get_by_role("button", name="name").first.click()
        assert names.all_inner_texts() == ["site-0", "site-1", "site-2"]
        assert page.locator("th[aria-sort=ascending]").count() == 1
        pictures = page.locator(".gallery img")
        assert pictures.count() == 8
        assert all(picture.get_attribute("alt") for picture in pictures.all())
        assert all(figure.get_attribute("aria-label") for figure in page.locator("figure").all())
        browser.close()
    assert not problems
