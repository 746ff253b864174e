"""`coppice retry`: failed rows are answered again, in the same run, and nothing else changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from pipeline.engine.base import NO_HOOKS, EngineCapabilities, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError, RunDirectoryError, TooManyFailedRows, UsageError
from pipeline.job.observer import Observer
from pipeline.job.outcome import RunOutcome
from pipeline.location import Location
from pipeline.model.model import load_model
from pipeline.plan.plan import Plan
from pipeline.records import Completion, Timing
from pipeline.run import retry_job, run_job, write_report
from pipeline.settings import JobSettings
from pipeline.status import read_status
from pipeline.storage.part_swap import swap_part
from pipeline.storage.run_directory import RunDirectory
from tests.tiny_job import answers, echo_settings, on, write_prompts

# Rows 1 and 4 are one prompt; row 3 is refused; 12 and 13 share a beginning with others.
PROMPTS: list[str | None] = [
    "hello a", "hello b", "hello c", None, "hello b", "bye", "hello d", "good bye", "hello e",
    "x", "y", "z", "hello world a", "hello world b",
]  # fmt: skip
FAILING = ("hello b", "hello world a", "z")


class Picky(EchoEngine):
    """Echoes, but for the prompts (token by token a character) of which it says there is no room;
    `after` answers it does `act`."""

    def __init__(
        self, *failing: int, after: int = 10**9, act: Callable[[], object] | None = None
    ) -> None:
        super().__init__()
        self.failing = set(failing)
        self.ran: list[int] = []
        self._after, self._act = after, act

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        for done in super().generate(plan, sequences, control, hooks):
            if len(self.ran) == self._after and self._act is not None:
                self._act()
            row = int(plan.sequences.row[done.sequence])
            self.ran.append(row)
            failed = Completion(done.sequence, (), "error", 0, Timing(), "OutOfMemory", "no room")
            yield failed if row in self.failing else done


class Listening(Observer):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def job(tmp_path: Path, tokenizer_folder: Path) -> JobSettings:
    write_prompts(tmp_path / "p.parquet", PROMPTS)
    return echo_settings(tokenizer_folder, max_new_tokens=30, rows_per_part=3, fail_on_error="100%")


@pytest.fixture
def run(tmp_path: Path, job: JobSettings) -> Location:
    """A complete run in which the rows of FAILING and one without a prompt failed."""
    run_job(str(tmp_path / "p.parquet"), tmp_path / "out", job, make_engine=on(Picky(1, 11, 12)))
    return Location(str(tmp_path / "out"))


def retry(run: Location, engine: EchoEngine, **changes: Any) -> RunOutcome:
    return retry_job(run, changes, make_engine=on(engine))


def rows_of(run: Location) -> pl.DataFrame:
    rows = answers(run.local)
    return rows.drop([name for name in rows.columns if name.endswith("_s")])


def test_a_retry_answers_the_failed_rows_and_no_other(run: Location) -> None:
    before = rows_of(run)
    assert before.filter(pl.col("status") == "error")["row_index"].to_list() == [1, 3, 4, 11, 12]
    engine = Picky()
    outcome = retry(run, engine)
    after = rows_of(run)
    assert sorted(engine.ran) == [1, 11, 12]
    assert (outcome.counters["rows_ok"], outcome.rows_failed) == (13, 1)
    assert outcome.reasons == {"NullPrompt": 1}
    was_ok = before["status"] == "ok"
    assert after.filter(was_ok).equals(before.filter(was_ok))
    assert after["row_index"].to_list() == list(range(14))
    assert after["generated_text"][1] == after["generated_text"][4] == "b olleh"
    assert after["dedup_of"][4] == "r1"


def test_attempts_count_those_that_came_before(run: Location) -> None:
    retry(run, Picky(12))
    assert rows_of(run)["attempts"].gather([0, 1, 3, 4, 12]).to_list() == [1, 2, 0, 2, 2]
    retry(run, Picky())
    assert rows_of(run)["attempts"].gather([0, 1, 3, 4, 12]).to_list() == [1, 2, 0, 2, 3]
    record = pl.read_parquet(run.local / "retried.parquet")
    assert record.select("row_index", "attempts").rows() == [(1, 1), (4, 1), (11, 1), (12, 2)]


def test_rows_refused_because_of_their_input_stay_refused_and_are_said(run: Location) -> None:
    observer, before = Listening(), rows_of(run)
    retry_job(run, {}, observer, on(Picky()))
    assert "4 failed rows are computed again; 1 stay refused" in observer.lines
    assert rows_of(run).row(3) == before.row(3)


class PickyPrefix(PrefixEngine):
    """The real one, which says of some rows that there was no room for them."""

    failing: tuple[int, ...] = ()

    def _completions(self, plan: Plan, *others: Any) -> Iterator[Completion]:
        for done in super()._completions(plan, *others):
            failed = Completion(done.sequence, (), "error", 0, Timing(), "OutOfMemory", "no room")
            yield failed if int(plan.sequences.row[done.sequence]) in self.failing else done


def test_a_retry_computes_the_unique_tokens_of_its_rows_and_says_so(
    tmp_path: Path, model_folder: Path
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    flat = {"dtype": "float32", "max_new_tokens": 4, "fail_on_error": "100%"}
    settings = JobSettings.from_flat({"model": str(model_folder), **flat})
    engines: list[PickyPrefix] = []

    def make(settings: JobSettings) -> PickyPrefix:
        engines.append(PickyPrefix(load_model(settings.model), settings.engine))
        engines[-1].failing = () if len(engines) > 1 else (1, 11, 12)
        return engines[-1]

    whole, out = tmp_path / "whole", Location(str(tmp_path / "out"))
    run_job(str(source), out.path, settings, make_engine=make)
    observer = Listening()
    retry_job(out, {}, observer, make)
    # "hello b", "hello world a" and "z", of which the first two share "hello ".
    assert engines[1].counters.prefilled_tokens == 7 + 13 + 1 - 6
    assert any("15 of them now" in line for line in observer.lines)
    manifest = json.loads((out.local / "run.json").read_text())
    assert manifest["sessions"][1]["unique_tokens"] == 15
    first, second = (session["prefilled_tokens"] for session in manifest["sessions"])
    assert manifest["counters"]["prefilled_tokens"] == first + second
    run_job(str(source), whole, settings, make_engine=make)
    text = "generated_text"
    assert answers(out.local)[text].to_list() == answers(whole)[text].to_list()


def test_a_retry_that_computes_other_tokens_than_planned_is_an_error(run: Location) -> None:
    class Wasteful(Picky):
        capabilities = EngineCapabilities(computes_once=True)

    with pytest.raises(EngineError, match="21 prompt tokens were prefilled where the plan says 15"):
        retry(run, Wasteful())


def test_a_reader_of_the_files_sees_one_row_an_input_row(run: Location) -> None:
    retry(run, Picky())
    shown = pl.read_parquet(run.local / "data" / "*.parquet")
    assert sorted(shown["id"].to_list()) == sorted(f"r{i}" for i in range(14))
    assert pl.read_parquet(run.local / "failed.parquet")["id"].to_list() == ["r3"]
    assert not list((run.local / "data").glob(".*"))


def test_what_an_audit_said_of_other_rows_goes(run: Location) -> None:
    (run.local / "audit").mkdir()
    for name in ("summary.json", "audit.parquet"):
        (run.local / "audit" / name).write_text("old")
    retry(run, Picky())
    assert not list((run.local / "audit").iterdir())
    assert read_status(run)["audit"] is None
    write_report(run)
    assert "13" in (run.local / "report.md").read_text()


def test_where_nothing_can_be_retried_nothing_is_touched(run: Location) -> None:
    retry(run, Picky())
    before = {p: p.stat().st_mtime_ns for p in run.local.rglob("*") if p.is_file()}
    engine = Picky()
    assert retry(run, engine).was_complete
    assert not engine.ran
    now = {p: p.stat().st_mtime_ns for p in run.local.rglob("*") if p.is_file()}
    assert {p: now[p] for p in before if p.name != ".lock"} == {
        p: before[p] for p in before if p.name != ".lock"
    }


def test_a_model_that_cannot_be_loaded_leaves_the_run_complete(run: Location) -> None:
    def broken(settings: JobSettings) -> EchoEngine:
        raise EngineError("no device")

    before = rows_of(run)
    with pytest.raises(EngineError, match="no device"):
        retry_job(run, {}, make_engine=broken)
    assert read_status(run)["status"] == "complete"
    assert rows_of(run).equals(before)


def test_a_retry_that_is_stopped_goes_on_by_the_same_call_and_by_a_run(
    run: Location, tmp_path: Path, job: JobSettings
) -> None:
    def stop() -> None:
        raise EngineError("stop")

    with pytest.raises(EngineError):
        retry(run, Picky(after=1, act=stop))
    assert read_status(run)["rows_left"] > 0
    engine = Picky()
    retry(run, engine)
    assert read_status(run)["rows_failed"] == 1
    assert rows_of(run)["row_index"].to_list() == list(range(14))
    with pytest.raises(EngineError):
        retry(Location(str(_again(tmp_path, job))), Picky(after=0, act=stop))
    outcome = run_job(
        str(tmp_path / "p.parquet"), tmp_path / "second", job, make_engine=on(Picky())
    )
    assert outcome.reasons == {"NullPrompt": 1}


def _again(tmp_path: Path, job: JobSettings) -> Path:
    second = tmp_path / "second"
    run_job(str(tmp_path / "p.parquet"), second, job, make_engine=on(Picky(1, 11, 12)))
    return second


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_a_retry_killed_between_any_two_writes_goes_on(
    run: Location, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Killed: nothing that would be done afterwards is done."""
    expected, count = rows_of(run), 0

    class Killed(BaseException):
        pass

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count >= dies_at:
                raise Killed
            return act(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(BaseException):  # noqa: B017
            retry(run, Picky())
    shown = pl.read_parquet(run.local / "data" / "*.parquet")["row_index"]
    assert shown.n_unique() == len(shown)
    retry(run, Picky())
    rows = rows_of(run)
    assert rows["row_index"].to_list() == list(range(14))
    was_ok = expected["status"] == "ok"
    assert rows.filter(was_ok).equals(expected.filter(was_ok))
    assert rows["status"].to_list().count("error") == 1


def test_a_run_that_is_not_complete_is_finished_before_it_is_retried(
    tmp_path: Path, job: JobSettings
) -> None:
    def stop() -> None:
        raise EngineError("stop")

    with pytest.raises(EngineError):
        engine = Picky(1, after=5, act=stop)
        run_job(str(tmp_path / "p.parquet"), tmp_path / "out", job, make_engine=on(engine))
    with pytest.raises(RunDirectoryError, match="not complete; finish it by the command"):
        retry(Location(str(tmp_path / "out")), Picky())


def test_settings_that_decide_no_answer_may_change_and_others_not(run: Location) -> None:
    with pytest.raises(RunDirectoryError, match="another temperature"):
        retry(run, Picky(), temperature=0.5)
    with pytest.raises(UsageError, match="max-rows: must be at least 1"):
        retry(run, Picky(), max_rows=0)
    with pytest.raises(TooManyFailedRows, match="1 of 14 rows failed"):
        retry(run, Picky(), fail_on_error="0")
    assert read_status(run)["rows_failed"] == 1


def test_parts_in_input_order_stay_so(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    settings = echo_settings(
        tokenizer_folder, rows_per_part=3, fail_on_error="100%", preserve_order=True
    )
    run_job(str(source), tmp_path / "out", settings, make_engine=on(Picky(1, 11, 12)))
    retry(Location(str(tmp_path / "out")), Picky())
    parts = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    rows = [row for part in parts for row in pl.read_parquet(part)["row_index"].to_list()]
    assert rows == list(range(14))
    assert len(parts) == 5


def test_a_part_whose_rows_have_all_failed_goes(tmp_path: Path, job: JobSettings) -> None:
    source = write_prompts(tmp_path / "q.parquet", ["a", "b", "c"])
    run_job(str(source), tmp_path / "out", job, make_engine=on(Picky(0, 1, 2)))
    retry(Location(str(tmp_path / "out")), Picky())
    assert answers(tmp_path / "out")["generated_text"].to_list() == ["a", "b", "c"]
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1


def test_an_old_part_comes_back_where_its_successor_was_not_written(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory.open(run.local)
    footer = directory.footers()[0]
    before = rows_of(run)

    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    from pipeline.storage import part_swap

    with monkeypatch.context() as patch:
        patch.setattr(part_swap, "write_part", fail)
        with pytest.raises(OSError):
            swap_part(footer, part_swap.read_part(footer).slice(1))
    assert not footer.path.exists()
    manifest = json.loads((run.local / "run.json").read_text())
    RunDirectory.create_or_resume(run.local, manifest["fingerprint"], {}).close()
    assert rows_of(run).equals(before)
