"""Conversations on the real engine: cut off in the middle, full disks, histories too long."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.engine.base import (
    NO_HOOKS,
    EngineHooks,
    Indices,
    RunControl,
)
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError, StorageError
from pipeline.model.model import load_model
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.storage.part_file import write_part
from tests.conversation_job import AS_TURNS, Turn, write_turns
from tests.tiny_job import answers, on
from tests.torture.kills import MEASURED, Job, expected_content, kill_until_done
from tests.torture.victim import Server

WORDS = ["why?", "and then", "no", "go on.", "yes, but when", "a", "hm", "what is it"]
TURNS: list[Turn] = [
    (f"talk {talk % 4}", turn, f"{talk}: {WORDS[(talk + turn) % 8]}")
    for turn in range(8)
    for talk in range(4)
    if turn < 8 - talk
]
ANSWERS = [
    "id", "generated_text", "completion_token_ids", "prompt_tokens", "status", "error_type",
    "history_tokens", "kept_tokens", "span", "runs", "eviction_log",
]  # fmt: skip


@pytest.fixture
def flat(model_folder: Path) -> dict[str, Any]:
    said = {"model": str(model_folder), "max_new_tokens": 3, "rows_per_part": 3, "device": "cpu"}
    return said | AS_TURNS


def engine_of(flat: dict[str, Any]) -> PrefixEngine:
    settings = JobSettings.from_flat(flat)
    return PrefixEngine(load_model(settings.model), settings.engine)


class Cut:
    """An engine that ends after so many completions, as a killed process does."""

    def __init__(self, engine: PrefixEngine, after: int) -> None:
        self._engine, self._after = engine, after
        self.name, self.notes, self.capabilities = engine.name, engine.notes, engine.capabilities

    @property
    def counters(self) -> Any:
        return self._engine.counters

    def generate(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks = NO_HOOKS
    ) -> Iterator[Completion]:
        found = self._engine.generate(plan, sequences, control, hooks)
        for number, completion in enumerate(found):
            if number == self._after:
                raise EngineError("the device fell over")
            yield completion

    def close(self) -> None:
        self._engine.close()


def run(source: Path, output: Path, flat: dict[str, Any], engine: Any) -> pl.DataFrame:
    run_job(str(source), output, JobSettings.from_flat(flat), make_engine=on(engine))
    return answers(output)


@pytest.mark.parametrize("preserve_order", [False, True])
def test_a_job_cut_off_in_the_middle_of_turns_ends_as_if_it_had_not_been(
    tmp_path: Path, flat: dict[str, Any], preserve_order: bool
) -> None:
    flat = flat | {"preserve_order": preserve_order}
    source = write_turns(tmp_path / "turns.parquet", TURNS)
    whole = run(source, tmp_path / "whole", flat, engine_of(flat))
    naive = run(source, tmp_path / "naive", flat, NaiveEngine(engine_of(flat).loaded))
    assert whole.select(ANSWERS).equals(naive.select(ANSWERS))
    for cuts in ((1, 2), (4, 9), (11, 11), (24,), (len(TURNS) - 1,)):
        output = tmp_path / f"cut-{cuts[0]}"
        for after in cuts:
            with pytest.raises(EngineError, match="fell over"):
                run(source, output, flat, Cut(engine_of(flat), after))
        rows = run(source, output, flat, engine_of(flat))
        assert rows.select(ANSWERS).equals(whole.select(ANSWERS))


def test_a_full_disk_in_the_middle_of_a_conversation_loses_nothing_that_is_committed(
    tmp_path: Path, flat: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_turns(tmp_path / "turns.parquet", TURNS)
    whole = run(source, tmp_path / "whole", flat, engine_of(flat))
    calls = 0

    def full(*arguments: Any, **named: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise StorageError("no space left on the disk; free some and run again")
        return write_part(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.storage.run_directory.write_part", full)
        with pytest.raises(StorageError, match="no space left"):
            run(source, tmp_path / "out", flat, engine_of(flat))
    done = answers(tmp_path / "out")
    assert len(done) == 9 and not (tmp_path / "out" / "_SUCCESS").exists()
    engine = engine_of(flat)
    rows = run(source, tmp_path / "out", flat, engine)
    assert rows.select(ANSWERS).equals(whole.select(ANSWERS))
    ran = whole.filter(~pl.col("id").is_in(done["id"].implode()))
    assert engine.counters.generated_tokens == ran["completion_token_ids"].list.len().sum()


@pytest.mark.parametrize(
    ("more", "most"),
    [({}, 128), ({"generation_options": {"max_length": 70}, "max_new_tokens": None}, 70)],
    ids=["window", "max_length"],
)
def test_a_history_that_reaches_what_the_model_allows_is_an_error_of_its_row_alone(
    tmp_path: Path, flat: dict[str, Any], more: dict[str, Any], most: int
) -> None:
    """The answer before it gets what is left; by the engine that carries and by those that do
    not. Of the model's `max_length` too, which counts all that was said before."""
    longer = [(name, turn, f"so i say: {text}") for name, turn, text in TURNS]
    source = write_turns(tmp_path / "turns.parquet", longer)
    flat = flat | {"fail_on_error": "100%"} | more
    engine = engine_of(flat)
    rows = run(source, tmp_path / "out", flat, engine)
    naive = run(source, tmp_path / "naive", flat, NaiveEngine(engine.loaded))
    assert rows.select(ANSWERS).equals(naive.select(ANSWERS))
    for talk in rows.sort("turn").partition_by("conversation_id"):
        errors = [kind for kind in talk["error_type"].to_list() if kind]
        assert errors[:1] in ([], ["ContextExceeded"])
        assert set(errors) <= {"ContextExceeded", "PriorTurnFailed"}  # found by the plan, or after
    ran = rows.filter(status="ok")
    used = ran["prompt_tokens"] + ran["completion_token_ids"].list.len()
    assert used.max() == most and rows["error_type"].count(), "128: of the model of tests"


@pytest.mark.parametrize("evictor", ["sink-recent", "h2o", "attention-top"])
def test_what_was_evicted_before_a_cut_stays_evicted(
    tmp_path: Path, flat: dict[str, Any], evictor: str
) -> None:
    """The log of the committed turns is applied again; runs, and those of each head."""
    flat = flat | {"evict": evictor, "budget_tokens": 40, "dtype": "float32"}
    source = write_turns(tmp_path / "turns.parquet", TURNS)
    whole = run(source, tmp_path / "whole", flat, engine_of(flat))
    totals = whole.select(pl.col("evictions").sum(), pl.col("skew", "kept_tokens").max()).row(0)
    assert totals[0] > 4 and totals[1] == 0 and totals[2] <= 40
    for after in (9, 20):
        output = tmp_path / f"cut-{after}"
        with pytest.raises(EngineError, match="fell over"):
            run(source, output, flat, Cut(engine_of(flat), after))
        rows = run(source, output, flat, engine_of(flat))
        assert rows.select(ANSWERS).equals(whole.select(ANSWERS))


@dataclass(frozen=True)
class TurnsJob(Job):
    """A command whose rows are turns, with these further `flags`."""

    flags: tuple[str, ...] = ()

    def arguments(self, output: Path) -> tuple[str, ...]:
        return (*super().arguments(output), "--conversation-column", "conversation_id", *self.flags)


@pytest.mark.fault(
    "conversations",
    injected="kill -9 at random moments, in the middle of turns, with tokens evicted and without",
    outcome="no turn lost, doubled or another one after the last call",
)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--evict", "sink-recent", "--budget-tokens", "44"),
    ],
    ids=str,
)
def test_conversations_outlive_kills(
    tmp_path: Path, model_folder: Path, server: Server, flags: tuple[str, ...]
) -> None:
    turns: list[Turn] = [
        (f"talk {talk}", turn, f"{talk % 3}{WORDS[(talk + turn) % 8]}")
        for turn in range(7)
        for talk in range(10)
    ]
    source = write_turns(tmp_path / "turns.parquet", turns)
    measured = (*MEASURED, "mass_kept")  # a float, by the rows beside it
    job = TurnsJob(tmp_path, source, model_folder, len(turns), 9, measured, flags)
    expected = expected_content(job, server)
    figures = kill_until_done(job, server, expected, random.Random(5), most_kills=5)
    assert (figures.rows_lost, figures.rows_twice) == (0, 0)
