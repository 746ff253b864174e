"""Conversations in the benchmark: what each arm is asked, and what counts as computed."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scratch
from benchmarks.arm import CarryArm
from benchmarks.arms import ARMS
from benchmarks.conversations import (
    Case,
    computed_tokens,
    least_work,
    make_cases,
    measure,
    median_of,
    new_tokens,
    ratios,
)
from benchmarks.job import Job, read_answers
from benchmarks.launcher import Outcome
from benchmarks.peers.answering import answer_batches
from benchmarks.setup import Setup
from benchmarks.shapes import model_folder
from benchmarks.turns import draw_turns, plan_turns
from pipeline.plan.conversations import Eviction

ROUNDS = draw_turns(conversations=3, turns=4, tokens=9, vocabulary_size=32768)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(scratch.VARIABLE, str(tmp_path_factory.mktemp("bench")))
        folder = model_folder("tiny", "float32")
    return Job(str(folder), "float32", 5, ROUNDS, is_conversation=True)


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path))


@pytest.mark.slow
def test_carried_and_sent_again_give_the_same_answers_and_counts(job: Job) -> None:
    carried, again = (
        measure(Case(arm, arm, job, arm == "carry"), 120) for arm in ("carry", "prefix")
    )
    assert carried["computed"] == 3 * (4 * 9 + 3)
    assert again["computed"] == 3 * sum(9 * (t + 1) + 5 * t for t in range(4))
    assert carried["evictions"] == 0 and carried["most_runs"] == 1


def test_answers_of_a_carrying_arm_lie_turn_by_turn(job: Job) -> None:
    fitted = ARMS["carry"].fit(job)
    assert (fitted.conversations, len(fitted.batches)) == (3, 1)
    said = CarryArm(fitted).generate(fitted.batches[0], 5)
    asked: list[list[list[int]]] = []

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        asked.append(prompts)
        return said[3 * (len(asked) - 1) : 3 * len(asked)]

    answer_batches(own := Path("/dev/null"), "x", asdict(job), answer)
    assert own and [len(prompts[0]) for prompts in asked] == [9, 23, 37, 51]
    third = asked[2][1]
    assert third == ROUNDS[0][1] + said[1] + ROUNDS[1][1] + said[4] + ROUNDS[2][1]


def test_what_gives_up_tokens_computes_each_new_one_once(job: Job) -> None:
    eviction = {"evictor": "sink-recent", "budget_tokens": 30, "window": 40}
    found = measure(Case("x", "carry", replace(job, eviction=eviction), True), 120)
    assert found["evictions"] >= 3 and found["most_runs"] == 2
    assert 0 < found["eviction_s"] < found["seconds"]
    assert found["eviction_share"] == pytest.approx(found["eviction_s"] / found["seconds"])


def test_a_history_is_cut_on_the_left_and_caches_are_cold_once(job: Job, tmp_path: Path) -> None:
    asked: list[list[list[int]]] = []
    forgotten: list[int] = []

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        asked.append(prompts)
        return [[len(asked)] * 5 for _ in prompts]

    cut = asdict(replace(job, most_tokens=20))
    forget = lambda: forgotten.append(len(asked))  # noqa: E731
    answer_batches(tmp_path / "a", "x", cut, answer, forget=forget)
    assert [len(prompts[0]) for prompts in asked] == [9, 20, 20, 20]
    assert asked[2][1] == [*ROUNDS[1][1][-6:], *[2] * 5, *ROUNDS[2][1]]
    assert forgotten == [0]
    answers = read_answers(tmp_path / "a")
    assert computed_tokens(Case("naive", "naive", replace(job, most_tokens=20)), answers) == 3 * 69


def test_a_token_that_joins_an_answer_and_its_next_turn_is_fed_once() -> None:
    rounds = [[[1, 2], [1, 3]], [[7, 8], [9]]]
    assert new_tokens(rounds, [[5, 7], [5, 7], [0, 0], [0, 0]]) == 3 + 2 + 2
    plan = plan_turns(rounds, 100, 2, Eviction())
    assert plan.tokens_to_compute(np.arange(2)) == 3 + 3 + 2


def test_tokens_that_were_computed_twice_fail_the_benchmark(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters: dict[str, Any] = {"prefilled_tokens": 117, "recomputed_tokens": 1}
    counters |= {"decode_s": 1.0, "peak_kv_bytes": 1, "evictions": 0, "most_runs": 1}
    answer = {
        "seconds": 1.0, "engine": "x", "token_ids": [[0]] * 12,
        "counters": counters | {"eviction_s": 0.0},
    }  # fmt: skip
    monkeypatch.setattr("benchmarks.conversations.run_arm", lambda *_: Outcome([answer], None))
    with pytest.raises(AssertionError, match="118, 117"):
        measure(Case("carry", "carry", job, True), 1.0)


def test_every_part_has_its_cases_and_its_limit(job: Job, tmp_path: Path) -> None:
    setup = Setup("tiny", "float32", 5, 1, 60.0, tmp_path, tmp_path)
    args = argparse.Namespace(
        conversations=8,
        turns=4,
        new=9,
        window=40,
        cache_gib=1,
        one_by_one=2,
        others=["prefix", "vllm"],
    )
    names = [case.name for part in ("within", "past", "spill")
             for case in make_cases(part, setup, args)]  # fmt: skip
    assert names == [
        "carry", "prefix, again", "vllm, again", "naive, a few",
        "carry, sink-recent", "carry, window", "prefix, cut", "vllm, cut",
        "carry, spilled", "carry, computed again",
    ]  # fmt: skip
    work = least_work(args, setup)
    assert (work.prefilled_tokens, work.decoded_tokens) == (8 * 36, 8 * 19)
    assert work.pairs == 8 * 55 * 56 // 2


def test_ratios_are_of_what_was_measured() -> None:
    assert median_of([{"seconds": 3}, {"seconds": 1}, {"seconds": 2}]) == {"seconds": 2}
    assert median_of([{"seconds": 3}, {"failure": "x"}]) == {"failure": "x"}
    fast = {"seconds": 1.0, "turns_per_s": 10.0, "computed": 5, "decode_us_per_token": 11.0}
    slow = {"seconds": 4.0, "turns_per_s": 2.5, "computed": 50, "decode_us_per_token": 10.0}
    cases: dict[str, dict[str, Any]] = {
        "carry": fast, "prefix, again": slow, "vllm, again": {"failure": "x"},
        "carry, sink-recent": fast, "carry, window": slow, "prefix, cut": slow,
        "carry, spilled": fast, "carry, computed again": slow,
    }  # fmt: skip
    assert ratios(cases) == {
        "turns/s, carry : prefix, again": 4, "tokens, prefix, again : carry": 10,
        "turns/s, carry, sink-recent : prefix, cut": 4,
        "tokens, prefix, cut : carry, sink-recent": 10, "step, sink-recent : window": 1.1,
        "seconds, computed again : spilled": 4,
    }  # fmt: skip
