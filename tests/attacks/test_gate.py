"""The gate believes no verdict and no counter: it counts the audited rows and the parts again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.audit.gate import current_verdict
from pipeline.cli.tables import status_table
from pipeline.errors import CoppiceError, RunDirectoryError, StorageError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.night.publication import publish_by_hand, publish_run
from pipeline.night.state import read_state
from pipeline.run import write_report
from pipeline.settings import AuditSettings
from pipeline.status import read_status
from pipeline.storage.part_file import (
    _METADATA_KEY,
    encode_parquet,
    read_part_footer,
    write_part,
)
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.schema import OUTPUT_FIELDS
from tests.night.job import DAY, NightlyJob


def publish(job: NightlyJob, **changes: Any) -> Any:
    place, target = job.run_directory(), str(job.published)
    return publish_run(Location(place), Location(target), "reviews", DAY, **changes)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def marker(job: NightlyJob) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (job.published / DAY.isoformat() / "published.json").read_text()
    )
    return found


def plant_a_wrong_row(run: Path) -> int:
    """Another token in one answer, in a part whose name and footer are true of it."""
    (path,) = (run / "data").iterdir()
    footer = read_part_footer(path)
    table = pq.read_table(path)
    rows = pl.from_arrow(table)
    assert isinstance(rows, pl.DataFrame)
    wrong = rows["row_index"].max()
    tokens = [
        [2 + (t + 1) % 30 for t in ids] if row == wrong else ids
        for row, ids in zip(rows["row_index"], rows["completion_token_ids"].to_list(), strict=True)
    ]
    at = table.schema.get_field_index("completion_token_ids")
    changed = table.set_column(
        at, table.schema.field(at), pa.array(tokens, table.schema.field(at).type)
    )
    path.unlink()
    write_part(run / "data", 0, changed, footer.provenance)
    return int(str(wrong))


def test_a_night_audits_again_what_was_audited_by_a_lower_bar(audited: NightlyJob) -> None:
    """Seen red: a night of `audit-sample: 100%` published a wrong row after `--audit-sample 1`."""
    run = audited.run_directory()
    wrong = plant_a_wrong_row(run)
    for path in (run / "audit").iterdir():
        path.unlink()
    lax = AuditSettings(audit_sample="1", audit_min_exact=0.0, audit_free_running=0, audit_arms=0)
    first = audit_run(Location(run), lax)
    summary = run / "audit" / "summary.json"
    assert json.loads(summary.read_text())["bar"]["audit_sample"] == "1"
    if not first.passed:  # the sample met the planted row; say that it had not
        rows = pl.read_parquet(run / "audit" / "audit.parquet").filter(pl.col("row_index") != wrong)
        rows.write_parquet(run / "audit" / "audit.parquet")
        edit(
            summary, verdict="pass", reasons=[], rows_audited=rows.height, rows_exact=rows.height,
            classes={"identical": rows.height, "near_tie": 0, "drift": 0, "corrupt": 0},
        )  # fmt: skip
    audited.say(audit_sample="100%", publish="published")
    assert read_state(audited.night()).stage == "generated"
    (ending,) = audited.sit()
    assert ending.state == "failed" and "audit" in ending.sentence()
    assert audited.days_published() == []


@pytest.mark.parametrize(
    "lower",
    [
        {"audit_sample": "0"},
        {"audit_min_exact": 0.5},
        {"audit_free_running": 0},
        {"audit_arms": 0},
    ],
)
def test_each_part_of_the_bar_is_compared(audited: NightlyJob, lower: dict[str, Any]) -> None:
    run = audited.run_directory()
    summary = run / "audit" / "summary.json"
    held = json.loads(summary.read_text())
    bar, sample = held["bar"], str(held["rows_audited"])
    asked = audited.night().job.audit.model_copy(update={"audit_sample": sample})
    edit(summary, bar=bar | {"audit_sample": sample})
    directory = RunDirectory.open(run)
    assert current_verdict(directory, asked) == "pass"
    edit(summary, bar=bar | {"audit_sample": sample} | lower)
    assert current_verdict(directory, asked) == "laxer"
    assert current_verdict(directory) == "pass"
    with pytest.raises(RunDirectoryError, match="lower bar.*coppice audit"):
        publish(audited, bar=asked)


def test_an_audit_that_does_not_say_its_bar_is_done_again_by_a_night(audited: NightlyJob) -> None:
    summary = audited.run_directory() / "audit" / "summary.json"
    kept = {k: v for k, v in json.loads(summary.read_text()).items() if k != "bar"}
    summary.write_text(json.dumps(kept))
    directory = RunDirectory.open(audited.run_directory())
    assert current_verdict(directory, AuditSettings()) == "laxer"
    assert current_verdict(directory) == "pass"


def drop(path: Path) -> None:
    path.unlink()


def rewrite(path: Path, act: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    act(pl.read_parquet(path)).write_parquet(path)


FORGERIES: dict[str, Callable[[Path], None]] = {
    "no audited rows": lambda a: drop(a / "audit.parquet"),
    "more rows than were audited": lambda a: edit(a / "summary.json", rows_audited=10_000),
    "an empty table": lambda a: rewrite(a / "audit.parquet", lambda rows: rows.clear()),
    "a corrupt row": lambda a: rewrite(
        a / "audit.parquet", lambda rows: rows.with_columns(audit_class=pl.lit("corrupt"))
    ),
    "rows that are not exact": lambda a: rewrite(
        a / "audit.parquet", lambda rows: rows.with_columns(audit_exact=pl.lit(False))
    ),
    "rows of another run": lambda a: rewrite(
        a / "audit.parquet", lambda rows: rows.with_columns(id=pl.lit("x") + pl.col("id"))
    ),
    "a row twice": lambda a: rewrite(
        a / "audit.parquet", lambda rows: pl.concat([rows.head(1)] * 2)
    ),
    "groups without a row": lambda a: edit(a / "summary.json", groups_total=99),
    "a free run that differs": lambda a: edit(
        a / "summary.json", free_running={"rows": 1, "exact": 0, "unexplained": 1}
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_verdict_that_its_rows_do_not_bear_out_publishes_nothing(
    audited: NightlyJob, forgery: str
) -> None:
    """Seen red: `"verdict": "pass"` without `audit.parquet` published."""
    FORGERIES[forgery](audited.run_directory() / "audit")
    with pytest.raises(RunDirectoryError, match="do not bear out its verdict; run: coppice audit"):
        publish(audited)
    assert audited.days_published() == []
    audited.say(publish="published")
    assert audited.sit()[0].state == "completed" and audited.days_published()


def test_status_says_no_pass_that_publish_would_not_believe(
    audited: NightlyJob,
) -> None:
    """Seen red: "audit pass" though `audit.parquet` was gone."""
    run = audited.run_directory()
    assert read_status(Location(run))["audit"] == "pass"
    (run / "audit" / "audit.parquet").unlink()
    assert read_status(Location(run))["audit"] == "unfounded"
    assert dict(status_table(read_status(Location(run))))["audit"].endswith(
        "do not bear out its verdict"
    )


def test_forged_counters_are_counted_again(audited: NightlyJob) -> None:
    """Seen red: the marker and the night's state repeated what run.json said."""
    run = audited.run_directory()
    counters = json.loads((run / "run.json").read_text())["counters"]
    edit(run / "run.json", counters=counters | {"rows_in": 7_000_000, "rows_error": 9})
    assert read_state(audited.night()).rows == 4
    assert publish(audited).rows == 4
    assert (marker(audited)["rows"], marker(audited)["rows_failed"]) == (4, 0)


def test_nothing_published_shares_an_inode_or_a_link_with_the_run(audited: NightlyJob) -> None:
    """Seen red: editing the run changed what was published."""
    run = audited.run_directory()
    (part,) = (run / "data").iterdir()
    elsewhere = audited.folder / "elsewhere.parquet"
    part.rename(elsewhere)
    part.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    publish(audited)
    copy = audited.published / DAY.isoformat() / "data" / part.name
    assert not copy.is_symlink() and copy.stat().st_nlink == 1 and not copy.samefile(elsewhere)
    assert elsewhere.stat().st_mode & 0o777 == 0o600
    with elsewhere.open("r+b") as file:
        file.write(b"????")
    assert copy.read_bytes() == before


def copy_part(run: Path) -> None:
    (part,) = (run / "data").iterdir()
    shutil.copy(part, part.with_name(part.name.replace("00000", "00007")))


def lose_part(run: Path) -> None:
    (part,) = (run / "data").iterdir()
    part.unlink()


def flip_a_bit(run: Path) -> None:
    (part,) = (run / "data").iterdir()
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def lose_plan(run: Path) -> None:
    (run / "plan" / "plan.parquet").unlink()


@pytest.mark.parametrize("harm", [copy_part, lose_part, flip_a_bit, lose_plan])
@pytest.mark.parametrize("command", ["convert", "report", "status", "publish", "audit"])
def test_every_command_checks_the_rows_against_the_plan(
    audited: NightlyJob, harm: Callable[[Path], None], command: str
) -> None:
    """Seen red: `convert` wrote 200 or 400 of 300 rows; `report` and `status` said "complete"."""
    run, target = audited.run_directory(), audited.folder / "answers.jsonl"
    (name,) = os.listdir(run / "data")
    page = (run / "report.html").read_bytes()
    harm(run)
    acts: dict[str, Callable[[], object]] = {
        "convert": lambda: convert(Location(run), Location(target)),
        "report": lambda: write_report(Location(run)),
        "status": lambda: read_status(Location(run)),
        "publish": lambda: publish_by_hand(Location(run), Location(audited.published), None, None),
        "audit": lambda: audit_run(Location(run), AuditSettings()),
    }
    said = "plan.parquet is gone" if harm is lose_plan else name
    with pytest.raises(CoppiceError, match=said) as error:
        acts[command]()
    assert error.value.exit_code in (1, 2) and not target.exists()
    assert (run / "report.html").read_bytes() == page


def test_a_footer_that_lies_about_its_rows_is_found(tmp_path: Path) -> None:
    table = pa.schema(OUTPUT_FIELDS).empty_table()
    said = {"schema_version": 2, "rows": [[0, 10**12]], "num_ok": 1, "num_error": 0}
    content = encode_parquet(
        table, {_METADATA_KEY.decode(): json.dumps(said | {"provenance": {}})}
    ).to_pybytes()
    path = tmp_path / f"part-00000-{hashlib.sha256(content).hexdigest()[:12]}.parquet"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read .*1000000000000 rows and it holds 0"):
        read_part_footer(path)
