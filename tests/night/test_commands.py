"""The commands night, publish and schedule: exit codes, and what goes to which stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_app import Shell, shell  # noqa: F401
from tests.night.job import DAY, PROMPTS, NightlyJob
from tests.night.test_night import fail_audits

DATE = DAY.isoformat()


def test_a_night_and_the_same_again(shell: Shell, job: NightlyJob) -> None:  # noqa: F811
    assert shell("night", str(job.file), "--date", DATE, "--progress", "none") == 0
    assert "Completed: 4 rows of 2026-11-22, audit pass" in shell.out.replace("\n", " ")
    assert shell("night", str(job.file), "--date", DATE, "--progress", "plain") == 0
    assert "is done; nothing to do" in shell.err
    assert shell("night", str(job.file), "--date", DATE, "--progress", "none", "--json") == 0
    (told,) = json.loads(shell.out)["nights"]
    assert (told["state"], told["date"], told["rows"]) == ("completed", DATE, 4)
    assert (told["verdict"], told["rows_failed"]) == ("pass", 0)
    assert not any(prompt in shell.out + shell.err for prompt in PROMPTS)


def test_the_exit_code_is_that_of_the_night(
    shell: Shell,  # noqa: F811
    job: NightlyJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = ("night", str(job.file), "--progress", "none", "--date")
    assert shell(*call, "2026-11-01", "--json") == 2
    (told,) = json.loads(shell.out)["nights"]
    assert (told["state"], told["exit_code"]) == ("failed", 2) and "no file" in told["error"]
    assert shell(*call, "2026-11-01") == 2
    assert "Failed: 2026-11-01: there is no file" in " ".join(shell.out.split())
    job.say(on_no_input="skip")
    assert shell(*call, "2026-11-01") == 0 and "Skipped" in shell.out
    assert shell(*call, "2026-11-01", "--json") == 0
    assert json.loads(shell.out)["nights"][0]["state"] == "skipped"
    assert shell(*call, "tonight") == 2 and "is not a date" in shell.err
    job.say(time_budget="0s")
    assert shell(*call, DATE) == 75 and "Stopped" in shell.out
    job.say(time_budget=None)
    fail_audits(monkeypatch)
    assert shell(*call, DATE) == 4 and "audit" in shell.err
    assert not job.published.exists()


@pytest.mark.parametrize("date", ["1970-01-01", "9998-12-31"])
def test_the_first_and_the_last_date_are_nights(
    shell: Shell,  # noqa: F811
    job: NightlyJob,
    date: str,
) -> None:
    """Seen red: "unexpected OverflowError" for 0001-01-01, which is a wrong call now."""
    assert shell("night", str(job.file), "--progress", "none", "--date", date) == 2
    assert f"Failed: {date}: there is no file" in " ".join(shell.out.split())
    assert shell("night", str(job.file), "--date", "0001-01-01") == 2
    assert "is no date of a night" in shell.err


def test_too_many_failed_rows(shell: Shell, job: NightlyJob) -> None:  # noqa: F811
    job.take_input()
    job.give_input(prompts=["why?", None])
    assert shell("night", str(job.file), "--date", DATE, "--progress", "none") == 3
    assert "1 of 2 rows failed (1 NullPrompt); --fail-on-error 1% allows 0" in shell.err


def test_publish_by_hand(shell: Shell, audited: NightlyJob) -> None:  # noqa: F811
    run, target = audited.run_directory(), audited.published
    assert shell("publish", str(run), str(target)) == 0
    assert shell.out == f"4 rows published at {target}/{DATE}\n"
    assert shell("publish", str(run), str(target)) == 0
    assert shell.out == f"4 rows were published at {target}/{DATE}\n"
    assert shell("publish", str(run), str(target), "--json") == 0
    told = json.loads(shell.out)
    assert told.pop("parts") >= 1
    assert told == {"location": f"{target}/{DATE}", "rows": 4, "is_new": False}
    summary = run / "audit" / "summary.json"
    found = json.loads(summary.read_text())
    summary.write_text(json.dumps(found | {"verdict": "fail"}))
    assert shell("publish", str(run), str(target.with_name("other"))) == 4
    summary.unlink()
    assert shell("publish", str(run), str(target.with_name("other"))) == 2
    assert "coppice audit" in shell.err and not target.with_name("other").exists()
    assert shell("publish", str(run), str(run / "published")) == 2
    assert shell("publish", str(target), str(run)) == 2


def test_schedule_prints_units_and_crontab(shell: Shell, job: NightlyJob) -> None:  # noqa: F811
    when = ("--cron", "0 2 * * *", "--timezone", "Europe/Berlin")
    assert shell("schedule", str(job.file), *when, "--print-systemd") == 0
    assert "OnCalendar=*-*-* 02:00:00 Europe/Berlin\n" in shell.out and shell.err == ""
    assert shell("schedule", str(job.file), *when, "--print-cron") == 0
    assert shell.out.splitlines()[2].startswith("0 2 * * * cd ")


@pytest.mark.parametrize(
    "wrong", [("0 2 * *", "UTC"), ("0 2 * * *", "Mars/Base"), ("0 2 30 2 *", "UTC")]
)
def test_a_wrong_schedule_is_one_sentence(
    shell: Shell,  # noqa: F811
    job: NightlyJob,
    wrong: tuple[str, str],
) -> None:
    cron, timezone = wrong
    call = ("schedule", str(job.file), "--cron", cron, "--timezone", timezone)
    assert shell(*call, "--print-cron") == 2
    assert len(shell.err.splitlines()) == 1 and shell.out == ""
    if timezone != "UTC" or "30" not in cron:
        night = ("night", str(job.file), "--cron", cron, "--timezone", timezone)
        assert shell(*night) == 2 and len(shell.err.splitlines()) == 1


def test_a_wrong_file_is_not_served(shell: Shell, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "nightly.yaml"
    file.write_text("name: reviews\n")
    assert shell("schedule", str(file), "--cron", "0 2 * * *", "--timezone", "UTC") == 2
    assert "setting input: must be given" in shell.err
