"""Documents are reused only where rows of the job itself say that answers stay what they are."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from pipeline.cli.tables import status_table
from pipeline.engine.base import NO_HOOKS, Engine, EngineHooks, RunControl
from pipeline.engine.load import make_engine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import DocumentsDisagree, EngineError, Interrupted, UsageError
from pipeline.job.calibration import choose_rows
from pipeline.job.observer import SilentObserver
from pipeline.location import Location
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job, write_report
from pipeline.settings import JobSettings
from pipeline.status import read_status
from tests.tiny_job import answers, on, write_model, write_prompts

DOCUMENTS = ["the oak is old. ", "a fox ran by. ", "rain fell all night. ", "the mill burnt. "]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and sure of what it says: what a document has not seen changes its answers."""
    return write_model(tmp_path_factory.mktemp("model"), sharpness=20.0)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return make_engine(settings(model))


def settings(model: Path, **flat: Any) -> JobSettings:
    return JobSettings.from_flat(
        {"model": str(model), "reuse": "concat", "max_new_tokens": 6, "threads": 1} | flat
    )


def write_table(path: Path, per_row: int = 3, rows: int = 12) -> Path:
    draw = np.random.default_rng(0)
    documents = [draw.permutation(DOCUMENTS)[:per_row].tolist() for _ in range(rows)]
    return write_prompts(path, [f"what {i}?" for i in range(rows)], documents=documents)


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Watched(PrefixEngine):
    """Notes every call (whether documents are moved, whether logits are looked at); `before_rows`
    is called before the rows of the job are answered."""

    def __init__(
        self, engine: PrefixEngine, before_rows: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(engine.loaded, engine.settings, engine.backend)
        self.calls: list[tuple[bool, bool]] = []
        self._before_rows = before_rows

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        self.calls.append((plan.documents is not None, hooks.on_logits is not None))
        if hooks.on_logits is None:
            self._before_rows()
        return super().generate(plan, sequences, control, hooks)


def calibration(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["calibration"]
    return found


def report_of(out: Path) -> str:
    write_report(Location(out))
    return (out / "report.html").read_text(encoding="utf-8")


def told(out: Path) -> pl.DataFrame:
    names = ("id", "completion_token_ids", "reuse_depth", "cached_tokens", "finish_reason")
    return answers(out).select(names)


def test_a_way_that_changes_answers_falls_back_to_exactly_what_prefix_answers(
    tmp_path: Path, model: Path, engine: PrefixEngine
) -> None:
    source, watched, said = write_table(tmp_path / "p.parquet"), Watched(engine), Listener()
    run_job(str(source), tmp_path / "out", settings(model), said, on(watched))
    exact = settings(model, reuse="prefix", documents_column="documents")
    run_job(str(source), tmp_path / "exact", exact, make_engine=on(engine))
    assert told(tmp_path / "out").equals(told(tmp_path / "exact"))
    found = calibration(tmp_path / "out")
    assert found["decision"] == "fallback" and found["agreement"]["mean_kl"] > 0.01
    assert found["agreement"]["rows"] == found["agreement"]["of_rows"] == 12
    assert found["by_documents"][0]["documents"] == 3 and found["cost"]["prefilled_tokens"] > 0
    assert watched.calls == [(False, True), (True, True), (False, False)]
    rows = answers(tmp_path / "out")
    assert set(rows["reuse_mode"]) == {"prefix"} and rows["exact"].all()
    assert set(rows["fallback_reason"]) == {"; ".join(found["reasons"])}
    assert sum("as by --reuse prefix" in line for line in said.lines) == 1
    status = read_status(Location(tmp_path / "out"))
    assert status["calibration"] == found
    assert "as by --reuse prefix" in dict(status_table(status))["documents"]
    assert "computed in full" in report_of(tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "of 12 calibrated rows get the answer of full attention" in page
    counters = json.loads((tmp_path / "out" / "run.json").read_text())["counters"]
    assert counters["prefilled_tokens"] == counters["unique_tokens"]
    plan = pl.read_parquet(tmp_path / "out" / "plan" / "plan.parquet").sort("row_index")
    assert plan["reuse_depth"].equals(told(tmp_path / "exact")["reuse_depth"].cast(pl.Int64))


def test_abort_ends_before_a_row_is_answered(
    tmp_path: Path, model: Path, engine: PrefixEngine
) -> None:
    source, out = write_table(tmp_path / "p.parquet"), tmp_path / "out"
    abort = settings(model, on_disagreement="abort")
    watched = Watched(engine)
    with pytest.raises(
        DocumentsDisagree, match=r"of all 12 rows get .* --min-agreement.* abort|fallback"
    ) as caught:
        run_job(str(source), out, abort, make_engine=on(watched))
    assert caught.value.exit_code == 4
    assert sorted(path.name for path in out.iterdir()) == [".lock", "data", "run.json"]
    assert list((out / "data").iterdir()) == []
    manifest = json.loads((out / "run.json").read_text())
    assert (manifest["status"], manifest["sessions"]) == ("failed", [])
    assert ">ended<" in report_of(out) and "--min-agreement" in report_of(out)
    with pytest.raises(DocumentsDisagree):
        run_job(str(source), out, abort, make_engine=on(watched))
    assert len(watched.calls) == 2, "it was measured again"
    said = Listener()
    run_job(str(source), out, settings(model), said, on(watched))
    assert calibration(out)["decision"] == "fallback" and len(watched.calls) == 3
    assert sum("as by --reuse prefix" in line for line in said.lines) == 1
    assert answers(out).height == 12


def test_warn_says_it_and_goes_on(tmp_path: Path, model: Path, engine: PrefixEngine) -> None:
    source, said = write_table(tmp_path / "p.parquet"), Listener()
    warn = settings(model, on_disagreement="warn")
    run_job(str(source), tmp_path / "out", warn, said, on(engine))
    assert calibration(tmp_path / "out")["decision"] == "warn"
    assert sum("reused all the same" in line for line in said.lines) == 1
    free = settings(model, calibration_rows=0)
    run_job(str(source), tmp_path / "free", free, said, on(engine))
    assert calibration(tmp_path / "free")["decision"] == "skipped"
    assert sum("--calibration-rows 0" in line for line in said.lines) == 1
    assert told(tmp_path / "out").equals(told(tmp_path / "free"))


def test_one_document_below_the_preamble_is_exact(
    tmp_path: Path, model: Path, engine: PrefixEngine
) -> None:
    source = write_table(tmp_path / "p.parquet", per_row=1)
    run_job(str(source), tmp_path / "out", settings(model), make_engine=on(engine))
    found = calibration(tmp_path / "out")
    assert found["decision"] == "reuse" and found["reasons"] == []
    assert found["agreement"]["same"] == 12 and found["agreement"]["lower_bound"] == 1.0
    assert found["agreement"]["mean_kl"] < 1e-6 and found["agreement"]["same_choice"] == 1.0


def test_a_calibration_that_is_stopped_is_none(
    tmp_path: Path, model: Path, engine: PrefixEngine
) -> None:
    class Stopped(Watched):
        def generate(
            self,
            plan: Plan,
            sequences: NDArray[np.int64],
            control: RunControl,
            hooks: EngineHooks = NO_HOOKS,
        ) -> Iterator[Completion]:
            os.kill(os.getpid(), signal.SIGINT)
            return super().generate(plan, sequences, control, hooks)

    source, out = write_table(tmp_path / "p.parquet"), tmp_path / "out"
    some_at_a_time = settings(model, max_rows=4)
    few = PrefixEngine(engine.loaded, some_at_a_time.engine, engine.backend)
    with pytest.raises(Interrupted, match="12 rows are left"):
        run_job(str(source), out, some_at_a_time, make_engine=on(Stopped(few)))
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["status"] == "stopped" and "calibration" not in manifest
    run_job(str(source), out, settings(model), make_engine=on(engine))
    assert calibration(out)["decision"] == "fallback" and answers(out).height == 12


@pytest.mark.parametrize("decision", ["fallback", "warn"])
def test_a_resumed_run_keeps_what_was_decided(
    tmp_path: Path, model: Path, engine: PrefixEngine, decision: str
) -> None:
    """Killed where the first row would be answered: what the disk has then is all that is left."""
    source, out = write_table(tmp_path / "p.parquet"), tmp_path / "killed"
    dying = Watched(engine, lambda: shutil.copytree(tmp_path / "out", out))
    asked = settings(model, on_disagreement=decision)
    run_job(str(source), tmp_path / "out", asked, make_engine=on(dying))
    before, watched = calibration(out), Watched(engine)
    assert list((out / "data").iterdir()) == []
    later, said = settings(model, on_disagreement="abort", calibration_rows=3), Listener()
    run_job(str(source), out, later, said, on(watched))
    assert not any("full attention" in line for line in said.lines)
    assert calibration(out) == before and before["decision"] == decision
    assert watched.calls == [(decision == "warn", False)]
    assert told(out).equals(told(tmp_path / "out"))


def test_rows_of_every_kind_are_chosen_and_always_the_same() -> None:
    draw = np.random.default_rng(1)
    documents, lengths = draw.integers(1, 5, 1000), draw.integers(1, 900, 1000)
    chosen = choose_rows(documents, lengths, 64)
    assert len(np.unique(chosen)) == 64 and np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, choose_rows(documents, lengths, 64))
    for number in range(1, 5):
        share = 64 * (documents == number).mean()
        assert abs((documents[chosen] == number).sum() - share) <= 1
        some = np.sort(lengths[chosen][documents[chosen] == number])
        assert some[0] < 150 and some[-1] > 750
    assert np.array_equal(choose_rows(documents, lengths, 1000), np.arange(1000))
    assert len(choose_rows(documents, lengths, 0)) == 0


def test_a_table_none_of_whose_rows_can_run_is_answered_with_reasons(
    tmp_path: Path, model: Path, engine: PrefixEngine
) -> None:
    """Seen red: IndexError."""
    source = write_prompts(tmp_path / "in.parquet", ["a" * 200] * 2, documents=[["a "], ["b "]])
    flat = settings(model, fail_on_error=1.0)
    run_job(str(source), tmp_path / "out", flat, make_engine=on(engine))
    assert answers(tmp_path / "out")["error_type"].to_list() == ["OverlongPrompt"] * 2
    assert calibration(tmp_path / "out")["decision"] == "skipped"


def test_a_model_that_fails_its_self_test_moves_no_document_and_says_why(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: the naive engine was made, which refused the run without the reason, exit 1."""

    def fail(engine: PrefixEngine) -> float:
        raise EngineError("self-test: the answers differ")

    monkeypatch.setattr("pipeline.engine.verify.self_test.self_test", fail)
    with pytest.raises(UsageError, match="the answers differ; choose --reuse prefix"):
        make_engine(settings(model))
    assert make_engine(settings(model, reuse="prefix")).name == "naive"
