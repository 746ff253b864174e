"""A study on invented outcomes: lines, medians, table and plot; no engine runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study as study_module
from benchmarks.agreement import agreement
from benchmarks.grid import make_cells
from benchmarks.job import Job
from benchmarks.launcher import Outcome
from benchmarks.plot import crossings, draw_break_even
from benchmarks.setup import Setup
from benchmarks.study import Cell, Study
from benchmarks.summary import read_lines, summarise
from benchmarks.table import write_results


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup("tiny", "float32", 2, 1, 10.0, tmp_path, tmp_path / "results")


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """By arm: what the next call brings."""
    prepared: dict[str, Outcome] = {}

    def run(arm: str, job: Job, limit_s: float) -> Outcome:
        answers = prepared[arm].answers[: len(job.batches)]
        return Outcome(answers, prepared[arm].failure)

    monkeypatch.setattr(study_module, "run_arm", run)
    monkeypatch.setattr(Setup, "model", lambda self: "model")
    monkeypatch.setattr(study_module, "gemm_rates", lambda model, dtype: {"matmul": 1e9})
    return prepared


def answer(seconds: float, *rows: list[int]) -> dict[str, Any]:
    return {
        "engine": "e 1", "seconds": seconds, "startup_s": 1.0, "token_ids": list(rows),
        "counters": None,
    }  # fmt: skip


def test_a_study_becomes_a_table_and_failures_are_rows(
    setup: Setup, outcomes: dict[str, Outcome]
) -> None:
    cell = Cell("shared_64", [[1, 2, 3], [1, 2, 4]])
    study = Study(setup, setup.results / "cases.jsonl")
    for repeat, (ours, theirs) in enumerate([(2.0, 3.0), (4.0, 2.0), (1.0, 2.0)]):
        outcomes["prefix"] = Outcome([answer(ours, [5, 6], [7, 8])], None)
        outcomes["vllm"] = Outcome([answer(theirs, [7, 9], [5, 6])], None)
        outcomes["generate"] = Outcome([], "did not finish in 10 s")
        study.measure_machine()
        study.run("prefix", [cell], repeat)
        study.run("vllm", [cell.presorted(), cell][repeat % 2 :][:1], repeat)
        study.run("generate", [cell], repeat)
    entries = {(e.line["arm"], e.line["order"]): e for e in summarise(read_lines(study._path))}
    assert entries["prefix", "given"].seconds == 2.0
    assert entries["vllm", "sorted"].ratio == pytest.approx(1.75)  # of 1.5 and 2.0
    assert entries["vllm", "given"].ratio == pytest.approx(0.5)
    assert entries["generate", "given"].seconds is None
    write_results(setup.results)
    text = (setup.results / "peers.md").read_text()
    assert "did not finish in 10 s" in text
    assert "**0.50**" in text and "takes 0.50 of our time" in text


def test_an_arm_that_failed_is_not_asked_again(setup: Setup, outcomes: dict[str, Outcome]) -> None:
    study = Study(setup, setup.results / "cases.jsonl")
    study.measure_machine()
    cells = [Cell("a", [[1]]), Cell("b", [[2]])]
    outcomes["vllm"] = Outcome([answer(1.0, [3, 4])], "ended without an answer")
    study.run("vllm", cells, 0)
    study.run("vllm", cells, 1)
    lines = [line for line in read_lines(study._path) if line["kind"] == "run"]
    failures = [(line["workload"], line["repeat"], line["failure"]) for line in lines]
    assert failures == [
        ("a", 0, None),
        ("b", 0, "ended without an answer"),
        ("b", 1, "not asked again: ended without an answer"),
        ("a", 1, None),
    ]


def test_agreement_is_by_prompt_whatever_the_order() -> None:
    ours: dict[tuple[int, ...], list[int]] = {(1,): [5, 6], (2,): [7, 8]}
    found = agreement([[2], [1]], [[7, 9], [5, 6]], ours)
    assert found == {"rows": 0.5, "tokens": 0.75, "first_tokens": 1.0}


def test_a_grid_draws_where_the_ratio_crosses_one(
    setup: Setup, outcomes: dict[str, Outcome]
) -> None:
    study = Study(setup, setup.results / "grid.jsonl")
    study.measure_machine()
    cells = make_cells([0, 8], [1, 4], 1000, 100)
    for arm, seconds in (("prefix", [1.0, 1.0, 1.0, 1.0]), ("unshared", [0.5, 2.0, 0.9, 4.0])):
        rows = [[[1, 2]] * cell.rows for cell in cells]
        answers = [answer(s, *r) for s, r in zip(seconds, rows, strict=True)]
        outcomes[arm] = Outcome(answers, None)
        study.run(arm, cells, 0)
    draw_break_even(setup.results)
    assert (setup.results / "break_even.png").stat().st_size > 1000
    text = (setup.results / "peers.md").read_text()
    assert "| 0 | 1 | 1.00 |" in text and "**0.50**" in text and "break_even.png" in text


def test_crossings_lie_between_measurements() -> None:
    assert crossings([(1, 0.5), (4, 2.0)]) == pytest.approx([2.0])
    assert crossings([(1, 2.0), (4, 0.5), (16, 2.0)]) == pytest.approx([2.0, 8.0])
    assert crossings([(1, 1.5), (4, 2.0)]) == []


def test_cells_of_a_grid_share_nothing_with_each_other() -> None:
    cells = make_cells([0, 4], [1, 2], 8, 30000)
    assert [(c.shared, c.rows) for c in cells] == [(0, 1), (0, 2), (4, 1), (4, 2)]
    assert len({tuple(c.prompts[0][:4]) for c in cells}) == 4
    assert make_cells([8], [2], 15, 30000) == []


def test_lines_hold_no_folder(setup: Setup, outcomes: dict[str, Outcome]) -> None:
    study = Study(setup, setup.results / "cases.jsonl")
    study.measure_machine()
    outcomes["prefix"] = Outcome([answer(1.0, [1, 2])], None)
    study.run("prefix", [Cell("a", [[1]])], 0)
    for line in read_lines(study._path):
        assert str(setup.results.parent) not in json.dumps(line)
