"""Names out of a bucket or a folder: none becomes a path before it is one that we make."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.audit.auditing import audit_run
from pipeline.errors import CoppiceError, RunDirectoryError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.night.publication import publish_by_hand
from pipeline.run import write_report
from pipeline.settings import AuditSettings
from pipeline.status import read_status
from pipeline.storage.manifest import new_manifest, parse_manifest
from pipeline.storage.part_file import PART_NAME
from pipeline.storage.part_list import part_file
from pipeline.storage.run_directory import RunDirectory
from tests.night.job import DAY, NightlyJob
from tests.storage.buckets import Store

NAMES = [
    "{secret}",
    "../{secret}",
    "../../run.json",
    "part-00000-0123456789ab.parquet/../../x",
    "part-00000-0123456789ab.parquet\n",
    "part-٠٠٠٠٠-0123456789ab.parquet",
    "",
    ".",
    "part-00000-0123456789ab.parquet\0",
    "\udcff",
]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "id_rsa"
    path.write_text("a key")
    path.chmod(0o600)
    return path


def upload(job: NightlyJob, store: Store, bucket: str) -> str:
    """The audited run, as `run` would have left it below s3://."""
    run = job.run_directory()
    for path in run.rglob("*"):
        if path.is_file() and path.name != ".lock":
            store.put(bucket, f"{DAY}/{path.relative_to(run)}", path.read_bytes())
    return f"s3://{bucket}/{DAY}"


def name_parts(job: NightlyJob, store: Store, bucket: str, name: str) -> None:
    (part,) = (job.run_directory() / "data").iterdir()
    manifest = json.loads((job.run_directory() / "run.json").read_text())
    described = {"bytes": part.stat().st_size, "rows_ok": 4, "rows_error": 0}
    manifest |= {"parts": {name: described}, "writer": {"name": "process 1 on x", "session": "s"}}
    store.put(bucket, f"{DAY}/run.json", json.dumps(manifest).encode())
    if name and "\0" not in name and name.isprintable():
        store.put(bucket, f"{DAY}/data/{name}", part.read_bytes())


def commands(url: str, folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "publish": lambda: publish_by_hand(
            Location(url), Location(folder / "published"), None, "reviews"
        ),
        "report": lambda: write_report(Location(url)),
        "status": lambda: read_status(Location(url)),
        "convert": lambda: convert(Location(url), Location(folder / "answers.jsonl")),
        "audit": lambda: audit_run(Location(url), AuditSettings()),
    }


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_another_name_is_refused_by_every_command(
    audited: NightlyJob,
    store: Store,
    bucket: str,
    tmp_path: Path,
    secret: Path,
    name: str,
) -> None:
    """Seen red: `publish` made the file 0644 with a second link; `report` wrote to any new path."""
    url = upload(audited, store, bucket)
    name_parts(audited, store, bucket, name.format(secret=secret))
    before = listing(tmp_path)
    for command, act in commands(url, tmp_path).items():
        with pytest.raises(RunDirectoryError, match=r"run\.json is damaged \(parts") as error:
            act()
        assert "\n" not in str(error.value).replace(name, ""), command
    assert listing(tmp_path) == before
    state = os.stat(secret)
    assert (state.st_mode & 0o777, state.st_nlink, secret.read_text()) == (0o600, 1, "a key")


def test_a_run_of_honest_names_is_read_by_every_command(
    audited: NightlyJob, store: Store, bucket: str, tmp_path: Path
) -> None:
    """Or the refusals above prove nothing."""
    url = upload(audited, store, bucket)
    (part,) = (audited.run_directory() / "data").iterdir()
    name_parts(audited, store, bucket, part.name)
    for act in commands(url, tmp_path).values():
        act()
    assert (tmp_path / "published" / DAY.isoformat() / "data" / part.name).exists()


def test_a_part_that_is_gone_from_the_bucket_is_named_by_every_command(
    audited: NightlyJob, store: Store, bucket: str, tmp_path: Path
) -> None:
    """`status` too, which fetches no part. Seen red: it said "complete"."""
    url = upload(audited, store, bucket)
    (part,) = (audited.run_directory() / "data").iterdir()
    name_parts(audited, store, bucket, part.name)
    store.client.delete_object(Bucket=bucket, Key=f"{DAY}/data/{part.name}")
    for act in commands(url, tmp_path).values():
        with pytest.raises(CoppiceError, match=part.name):
            act()


@pytest.mark.parametrize("run_id", ["../../x", "/etc/x", "X" * 16, "0" * 15, ""])
def test_a_run_id_of_another_form_is_refused(audited: NightlyJob, run_id: str) -> None:
    """It names the folder in which a publication is made."""
    path = audited.run_directory() / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": run_id}))
    for act in commands(str(audited.run_directory()), audited.folder).values():
        with pytest.raises(RunDirectoryError, match=r"run\.json is damaged \(run_id"):
            act()


def test_part_names_are_ours_in_ascii_and_nothing_else() -> None:
    assert PART_NAME.fullmatch("part-00000-0123456789ab.parquet")
    for name in NAMES:
        assert not PART_NAME.fullmatch(name)
        with pytest.raises(AssertionError):
            part_file(name)


def test_linked_files_are_neither_appended_to_nor_chmoded(
    audited: NightlyJob, secret: Path
) -> None:
    """`metrics.jsonl`, `report.html` and the lock as links to another file."""
    run = audited.run_directory()
    for name in ("report.html", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    write_report(Location(run))
    assert not (run / "report.html").is_symlink()
    with pytest.raises(CoppiceError, match="metrics.jsonl"):
        RunDirectory.open(run).append_metrics({"rows_done": 1})
    assert secret.read_text() == "a key" and secret.stat().st_mode & 0o777 == 0o600


def test_a_manifest_of_a_thousand_parts_is_read_in_no_time() -> None:
    """The names are checked by one expression, not one by one in Python."""
    part = {"bytes": 1, "rows_ok": 1, "rows_error": 0}
    parts = {f"part-{n:05d}-0123456789ab.parquet": part for n in range(10_000)}
    content = json.dumps(new_manifest({"a": 1}) | {"parts": parts}).encode()
    begin = time.process_time()
    parse_manifest(content, "x")
    assert time.process_time() - begin < 0.5
