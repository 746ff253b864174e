"""Nights from their input to their publication: what comes of each, and what a sitting finishes."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.auditing import audit_opened
from pipeline.audit.reopened_job import reopen_job
from pipeline.audit.verdict import Verdict
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.errors import (
    AuditFailed,
    CoppiceError,
    EngineError,
    FolderInUse,
    Interrupted,
    NoInput,
    StorageError,
    TimeBudgetReached,
    TooManyDegenerate,
    TooManyFailedRows,
)
from pipeline.inputs import parquet_input
from pipeline.job.job import Job
from pipeline.job.observer import Planning, SilentObserver
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.location import Location
from pipeline.night import night as night_module
from pipeline.night import steps
from pipeline.night.calendar import mark_due
from pipeline.night.ending import Ending, NightFailure, NightOutcome, worst
from pipeline.night.night import run_nights, sitting
from pipeline.night.opened_job import OpenedJob
from pipeline.night.settings import Night
from pipeline.night.state import read_state
from pipeline.night.steps import Step
from pipeline.records import Completion
from pipeline.run import run_opened
from pipeline.settings import JobSettings
from pipeline.storage.lock import FolderLock
from pipeline.storage.run_directory import RunDirectory
from tests.conversation_job import Turn, write_turns
from tests.job.preparing import watch_prepared
from tests.night.job import DAY, PROMPTS, NightlyJob, before
from tests.tiny_job import answers


def file_above(job: NightlyJob) -> None:
    (job.folder / "published").write_text("mine")


def folder_of_another(job: NightlyJob) -> None:
    (job.published / DAY.isoformat()).mkdir(parents=True)
    (job.published / DAY.isoformat() / "thesis.txt").write_text("mine")


def other_run(job: NightlyJob) -> None:
    held = {"edition": "e-1", "run_id": "other", "job": "other", "files": {}}
    (job.published / DAY.isoformat()).mkdir(parents=True)
    (job.published / DAY.isoformat() / "published.json").write_text(json.dumps(held))


def published_on_the_web(job: NightlyJob) -> None:
    job.say(publish="https://host/published")


def no_vllm(job: NightlyJob) -> None:
    job.say(engine="vllm")


TARGETS = [
    (file_above, "cannot publish to .*published: .*published is a file; choose another"),
    (folder_of_another, "is there already and is no publication of this run; move it away"),
    (other_run, r"holds another run \(other of other\); move it away"),
    (published_on_the_web, "https:// is not supported; use a folder, s3://"),
    (no_vllm, "--engine vllm needs vllm"),
]


@pytest.mark.parametrize(("spoil", "says"), TARGETS, ids=[says[:30] for _, says in TARGETS])
def test_what_a_night_will_need_is_checked_before_a_row_is_read(
    job: NightlyJob,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[NightlyJob], None],
    says: str,
) -> None:
    """Else a night would be planned, answered and audited first."""
    monkeypatch.setattr("pipeline.early_checks.find_spec", lambda name: None)
    spoil(job)
    prepared = watch_prepared(monkeypatch)
    (ending,) = job.sit()
    assert re.search(says, str(error_of(ending))), ending.sentence()
    assert prepared == [] and not (job.run_directory() / "run.json").exists()


def test_the_planning_of_a_night_is_shown(job: NightlyJob) -> None:
    """Else a night says nothing until its plan is made."""
    shown: list[Planning] = []

    class Watching(SilentObserver):
        def show_planning(self, planning: Planning) -> None:
            shown.append(planning)

    assert steps.plan_night(OpenedJob(job.night()), Watching())["rows"] == len(PROMPTS)
    assert shown and shown[-1].rows_done == len(PROMPTS)


def outcome(ending: Ending) -> NightOutcome:
    assert isinstance(ending, NightOutcome), ending.sentence()
    return ending


def error_of(ending: Ending) -> CoppiceError:
    assert isinstance(ending, NightFailure), ending.sentence()
    return ending.error


def act_after(patch: pytest.MonkeyPatch, after: int, act: Callable[[], object]) -> None:
    """Do that when so many rows are answered."""

    def make(settings: JobSettings) -> Engine:
        engine = make_engine(settings)
        generate = engine.generate

        def generate_and_act(*arguments: Any) -> Iterator[Completion]:
            for number, completion in enumerate(generate(*arguments)):
                if number == after:
                    act()
                yield completion

        engine.generate = generate_and_act  # type: ignore[method-assign,assignment]
        return engine

    patch.setattr(steps, "run_opened", partial(run_opened, make_engine=make))


def fall() -> None:
    raise EngineError("the device fell over")


def fail_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that full prefill does not confirm."""
    real = audit_opened

    def audit(opened: Job, run: Location, *rest: Any) -> Verdict:
        for part in (run.local / "audit").glob("*"):
            part.unlink()
        verdict = real(opened, run, *rest)
        path = run.local / "audit" / "summary.json"
        path.write_text(path.read_text().replace('"verdict": "pass"', '"verdict": "fail"'))
        return Verdict(**(vars(verdict) | {"verdict": "fail", "reasons": ("1 row is corrupt",)}))

    monkeypatch.setattr(steps, "audit_opened", audit)


def test_a_night_tokenises_its_input_once(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its plan leaves to its generation what is in the cache. Seen red: every row twice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Checkpoint, "every_rows", 1)
    monkeypatch.setattr(parquet_input, "BATCH_ROWS", 1)
    prepared = watch_prepared(monkeypatch)
    (ending,) = job.sit()
    assert outcome(ending).rows == len(PROMPTS)
    assert prepared == [*range(len(PROMPTS)), 0]  # and a row by the audit
    assert not list((tmp_path / "cache" / "coppice" / "plans").iterdir())


def test_a_night_is_published_and_done_only_once(job: NightlyJob) -> None:
    (ending,) = job.sit()
    done = outcome(ending)
    assert (done.state, done.rows, done.rows_failed, done.verdict) == ("completed", 4, 0, "pass")
    assert done.published == str(job.published / "2026-11-22")
    assert Path(str(done.page)).is_file()
    assert job.days_published() == ["2026-11-22"]
    marker = json.loads((job.published / "2026-11-22" / "published.json").read_text())
    run = json.loads((job.run_directory() / "run.json").read_text())
    assert (marker["job"], marker["date"], marker["rows"]) == ("reviews", "2026-11-22", 4)
    assert marker["run_id"] == run["run_id"] and len(run["sessions"]) == 1
    assert set(marker["files"]) == {
        "report.html", "report.md", f"data/{next((job.run_directory() / 'data').iterdir()).name}",
    }  # fmt: skip
    job.take_input()  # nothing of it is needed any more
    (again,) = job.sit()
    assert again == done


def test_each_step_is_called_by_name_and_returns_no_text(job: NightlyJob) -> None:
    called: dict[str, dict[str, Any]] = {}

    def call(name: str, night: Night, step: Step) -> dict[str, Any]:
        assert night.date == DAY
        called[name] = step()
        return called[name]

    run_nights(job.file, DAY, SilentObserver(), call)
    assert list(called) == ["validate", "plan", "generate", "audit", "report", "publish"]
    assert called["validate"]["rows"] == called["plan"]["rows"] == called["publish"]["rows"] == 4
    assert called["audit"]["verdict"] == "pass"
    assert "rows answered" in called["report"]["summary"]
    assert not any(prompt in json.dumps(called) for prompt in PROMPTS)


@pytest.mark.parametrize("allowed", ["0.3", "0.1"])
def test_failed_rows_are_said_below_the_bar_and_fail_the_night_above_it(
    job: NightlyJob, allowed: str
) -> None:
    job.take_input()
    job.give_input(prompts=[*PROMPTS, None])
    job.say(fail_on_error=allowed)
    (ending,) = job.sit()
    assert (job.run_directory() / "report.html").exists()
    if allowed == "0.3":
        done = outcome(ending)
        assert done.state == "completed_with_errors" and done.rows_failed == 1
        assert done.sentence().startswith("Completed with errors: 1 of 5 rows of 2026-11-22 failed")
        assert "(1 allowed)" in done.sentence()
        assert job.days_published() == ["2026-11-22"]
        return
    assert isinstance(error_of(ending), TooManyFailedRows) and error_of(ending).exit_code == 3
    assert job.days_published() == [] and not (job.run_directory() / "audit").exists()
    job.say(fail_on_error="0.3")  # a person has looked at the rows: the same night goes on
    assert outcome(job.sit()[0]).published


def test_a_night_of_conversations_is_published_unless_too_many_turns_repeat(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is there to see which."""
    job.take_input()
    folder = job.folder / "in" / "2026-11-22"
    folder.mkdir(parents=True)
    turns: list[Turn] = [("a", n, "say it again") for n in range(4)]
    write_turns(folder / "p.parquet", [*turns, ("b", 0, "once")])
    job.say(conversation_column="conversation_id", max_degenerate="30%")
    monkeypatch.setattr("pipeline.engine.resent.is_degenerate", lambda answer, before: bool(before))
    (ending,) = job.sit()
    assert isinstance(error_of(ending), TooManyDegenerate) and error_of(ending).exit_code == 4
    assert "turns repeat themselves" in (job.run_directory() / "report.md").read_text()
    assert job.days_published() == []
    job.say(max_degenerate=None)  # a person has looked at them: the same night goes on
    assert outcome(job.sit()[0]).published and job.days_published() == ["2026-11-22"]


@pytest.mark.fault(
    "audit failed",
    injected="a night whose audit is below its bar",
    outcome="exit code 4, a report, nothing published; the next night is not held up",
)
def test_a_failed_audit_leaves_its_report_and_publishes_nothing(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: `report` only after the audit."""
    with monkeypatch.context() as patch:
        fail_audits(patch)
        (ending,) = job.sit()
    assert isinstance(error_of(ending), AuditFailed) and error_of(ending).exit_code == 4
    assert "FAILED" in (job.run_directory() / "report.md").read_text()
    assert not job.published.exists()
    job.give_input(before(-1))
    (tomorrow,) = job.sit(before(-1))  # what waits for a person is not tried every night
    assert outcome(tomorrow).state == "completed"
    assert outcome(job.sit()[0]).state == "completed"  # but when somebody asks for it
    assert job.days_published() == ["2026-11-22", "2026-11-23"]


@pytest.mark.parametrize("wish", ["fail", "skip"])
@pytest.mark.fault(
    "night without input",
    injected="no file for the date",
    outcome="exit code 2, or skipped where the job says so; later nights do not repeat it",
)
def test_a_night_without_input_fails_or_is_skipped(job: NightlyJob, wish: str) -> None:
    """Seen red: the empty folder of the night left behind."""
    job.say(on_no_input=wish)
    job.take_input()
    (ending,) = job.sit()
    if wish == "skip":
        assert outcome(ending).sentence() == "Skipped: there is no input for 2026-11-22."
    else:
        assert isinstance(error_of(ending), NoInput) and error_of(ending).exit_code == 2
    assert not job.run_directory().exists()
    job.give_input(before(-1))
    assert [ending.date for ending in job.sit(before(-1))] == [before(-1)]


def test_an_input_folder_that_vanished_is_not_skipped(job: NightlyJob) -> None:
    job.say(on_no_input="skip", input="mount/{date}/*.parquet")
    (ending,) = job.sit()
    assert "is its disk mounted?" in str(error_of(ending)) and error_of(ending).exit_code == 2


def test_an_input_that_vanished_from_a_begun_night_is_not_skipped(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.say(on_no_input="skip")
    begin(job, monkeypatch)
    job.take_input()
    assert isinstance(error_of(job.sit()[0]), NoInput)


def begin(job: NightlyJob, monkeypatch: pytest.MonkeyPatch, day: Any = DAY) -> None:
    """The night of that day dies after two rows."""
    with monkeypatch.context() as patch:
        act_after(patch, 2, fall)
        (*_, ending) = job.sit(day)
    assert isinstance(error_of(ending), EngineError)
    assert read_state(job.night(day)).stage == "begun"


@pytest.mark.fault(
    "machine slept through the start",
    injected="a night begun late, with nights before it unfinished",
    outcome="each lands on its own date, oldest first; none is computed twice",
)
def test_unfinished_nights_come_first_each_on_its_own_date(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: newest first."""
    job.say(rows_per_part=1)
    job.say(catch_up=0)
    for ago in (4, 3, 1):
        job.give_input(before(ago))
        begin(job, monkeypatch, before(ago))
    job.say(catch_up=2)
    assert [ending.date for ending in job.sit()] == [before(1), DAY]
    job.say(catch_up=7)
    assert [ending.date for ending in job.sit()] == [before(4), before(3), DAY]
    assert job.days_published() == ["2026-11-18", "2026-11-19", "2026-11-21", "2026-11-22"]
    for ago in (4, 3, 1, 0):
        assert answers(job.run_directory(before(ago)))["row_index"].to_list() == [0, 1, 2, 3]


def test_a_night_that_fails_does_not_hold_up_the_next(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.give_input(before(1))
    begin(job, monkeypatch, before(1))
    job.take_input(before(1))
    yesterday, tonight = job.sit()
    assert isinstance(error_of(yesterday), NoInput) and outcome(tonight).published
    assert worst([yesterday, tonight]) is error_of(yesterday)


def test_a_publication_that_failed_is_made_up_for_without_input(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the end of the night; the input is gone a day later."""

    def refuse(night: Night) -> dict[str, Any]:
        raise StorageError("cannot write (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(night_module, "publish_night", refuse)
        (ending,) = job.sit()
    assert isinstance(error_of(ending), StorageError) and error_of(ending).exit_code == 1
    assert read_state(job.night()).stage == "audited"
    job.take_input()
    job.give_input(before(-1))
    assert [outcome(ending).date for ending in job.sit(before(-1))] == [DAY, before(-1)]
    assert job.days_published() == ["2026-11-22", "2026-11-23"]


@pytest.mark.fault(
    "time budget spent",
    injected="a night that takes longer than its budget",
    outcome="exit code 75; the next night finishes it first, also one that never began",
)
def test_what_a_time_budget_cut_off_is_finished_first(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both nights are unfinished then: one for it was stopped, one for it never began.

    Seen red: `mark_due` only for the night whose turn it is.
    """
    job.give_input(before(1), [f"which number? {number}" for number in range(9)])
    job.say(time_budget="1h", rows_per_part=1)
    begin(job, monkeypatch, before(1))
    now = time.monotonic()

    def skip_an_hour() -> None:
        monkeypatch.setattr(time, "monotonic", lambda: now + 3601.0)

    with monkeypatch.context() as patch:
        act_after(patch, 1, skip_an_hour)
        (ending,) = job.sit()
    monkeypatch.undo()
    assert isinstance(error_of(ending), TimeBudgetReached) and error_of(ending).exit_code == 75
    assert (ending.state, ending.date) == ("stopped", before(1))
    job.give_input(before(-1))
    endings = job.sit(before(-1))
    assert [ending.date for ending in endings] == [before(1), DAY, before(-1)]
    assert all(outcome(ending).published for ending in endings)


def test_a_night_that_ends_after_midnight_has_the_date_that_it_began_with(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chat template prints the date. Seen red: the date of whatever day it was done on."""
    template = job.folder / "t.jinja"
    template.write_text(
        "{{ strftime_now('%d.%m.%Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    job.say(rows_per_part=1, chat_template="t.jinja", apply_chat_template=True, catch_up=3)
    begin(job, monkeypatch, DAY)
    job.give_input(before(-1))
    endings = job.sit(before(-1))
    assert [outcome(ending).date for ending in endings] == [DAY, before(-1)]
    for day in (DAY, before(-1)):
        with RunDirectory.open(job.run_directory(day)) as directory:
            reopened = reopen_job(directory)
        assert reopened.tokenizer.render("why?") == f"{day:%d.%m.%Y} why?"


def test_the_budget_is_of_the_whole_sitting(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.give_input(before(1))
    begin(job, monkeypatch, before(1))
    job.say(time_budget="1h")
    budgets = []
    now = time.monotonic()

    def generate(opened: OpenedJob, observer: Any, time_budget_s: float) -> dict[str, Any]:
        budgets.append(time_budget_s)
        monkeypatch.setattr(time, "monotonic", lambda: now + 1800.0)
        return steps.generate_night(opened, observer, time_budget_s)

    monkeypatch.setattr(night_module, "generate_night", generate)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert all(outcome(ending).published for ending in job.sit())
    assert budgets == pytest.approx([3600.0, 1800.0])


@pytest.mark.fault(
    "clock set back or forward",
    injected="the wall clock jumps by a day either way during a night",
    outcome="time budget and durations take no notice",
)
@pytest.mark.parametrize("jump_s", [-86400.0, 86400.0])
def test_a_clock_that_is_set_does_not_spend_the_budget(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """It is set during the first of two nights.

    Seen red: `time.time` in `StopRequest`, and in `run_nights`.
    """
    job.say(time_budget="10m")
    job.give_input(before(1))
    mark_due(job.night(before(1)))
    real = time.time
    act_after(monkeypatch, 1, lambda: monkeypatch.setattr(time, "time", lambda: real() + jump_s))
    assert [outcome(ending).date for ending in job.sit()] == [before(1), DAY]
    counters = json.loads((job.run_directory(before(1)) / "run.json").read_text())["counters"]
    assert 0 <= counters["wall_s"] < 60


@pytest.mark.fault(
    "night still going",
    injected="a night whose predecessor is still going",
    outcome="exit code 2 with a sentence, nothing computed twice; the next sitting does it",
)
def test_a_night_waits_for_the_one_that_is_still_going(job: NightlyJob) -> None:
    """Seen red: without `mark_due` before the lock, the night of DAY was never done."""
    yesterday = job.night(before(1))
    with sitting(yesterday), pytest.raises(FolderInUse, match="still going.*process") as error:
        job.sit()
    assert error.value.exit_code == 2 and not list(job.run_directory().iterdir())
    job.give_input(before(-1))
    assert [ending.date for ending in job.sit(before(-1))] == [DAY, before(-1)]


def test_a_run_directory_that_somebody_holds_ends_the_sitting(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`coppice run` by hand into the folder of yesterday: tonight would want the same device."""
    job.give_input(before(1))
    begin(job, monkeypatch, before(1))
    lock = FolderLock(job.run_directory(before(1)))
    try:
        (ending,) = job.sit()
    finally:
        lock.release()
    assert isinstance(error_of(ending), FolderInUse) and ending.date == before(1)


def test_an_interruption_ends_the_sitting(job: NightlyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job.give_input(before(1), [f"which number? {number}" for number in range(9)])
    begin(job, monkeypatch, before(1))
    with monkeypatch.context() as patch:
        act_after(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        (ending,) = job.sit()
    assert isinstance(error_of(ending), Interrupted) and ending.state == "stopped"


def test_the_worst_ending_is_not_hidden() -> None:
    def failed(kind: type[Any]) -> Ending:
        return NightFailure(DAY, kind(kind.__name__))

    stop, audit, rows = failed(TimeBudgetReached), failed(AuditFailed), failed(TooManyFailedRows)
    fine = NightOutcome("completed", DAY)
    for endings, kind in [
        ([audit, stop], AuditFailed),
        ([rows, audit], TooManyFailedRows),
        ([fine, stop], TimeBudgetReached),
        ([rows, failed(Interrupted)], Interrupted),
    ]:
        assert isinstance(worst(endings), kind)
    assert worst([fine]) is None


def test_a_run_of_other_settings_in_the_place_of_a_night_is_refused(
    job: NightlyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(job, monkeypatch)
    job.say(max_new_tokens=5)
    (ending,) = job.sit()
    assert error_of(ending).exit_code == 2 and "max_new_tokens" in str(error_of(ending))


def test_a_night_of_which_too_many_rows_failed_waits_for_a_person(
    tmp_path: Path, model_folder: Path
) -> None:
    job = NightlyJob(tmp_path, model_folder, fail_on_error="0")
    job.give_input(prompts=["why?", None])
    assert error_of(job.sit()[0]).exit_code == 3
    state = read_state(job.night())
    assert (state.stage, state.rows, state.rows_failed) == ("too many failed", 2, 1)
    assert not state.is_unfinished and not job.published.exists()


def test_what_is_published_stays_when_the_bar_is_raised(audited: NightlyJob) -> None:
    assert outcome(audited.sit()[0]).published
    audited.say(audit_sample="100%")
    assert read_state(audited.night()).stage == "done"


def test_an_audit_of_other_rows_is_made_again(audited: NightlyJob) -> None:
    """Seen red: `current_verdict` without the seed."""
    summary = audited.run_directory() / "audit" / "summary.json"
    found = json.loads(summary.read_text())
    summary.write_text(json.dumps(found | {"seed": found["seed"] + 1}))
    assert read_state(audited.night()).stage == "generated"
    assert outcome(audited.sit()[0]).published
    assert json.loads(summary.read_text())["seed"] == found["seed"]


def test_a_night_in_a_thread_of_its_own(job: NightlyJob) -> None:
    """As a flow's engine calls it."""
    endings: list[Ending] = []
    thread = threading.Thread(target=lambda: endings.extend(job.sit()))
    thread.start()
    thread.join()
    assert outcome(endings[0]).published
