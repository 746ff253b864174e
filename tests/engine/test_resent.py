"""Conversations on engines that send the history again with every turn."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.engine.base import NO_HOOKS, Engine, EngineHooks, LocalEngine, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.resent import RESENT_NOTE
from pipeline.engine.vllm_engine import VllmEngine
from pipeline.errors import EngineError
from pipeline.plan.conversations import Eviction
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import Completion, EarlierTurn, SamplingParams
from tests.conversation_plan import GREEDY, plan_of
from tests.engine import tiny

SAMPLED = SamplingParams(max_new_tokens=3, temperature=1.0)


def run(
    engine: Engine, plan: Plan, hooks: EngineHooks = NO_HOOKS, control: RunControl | None = None
) -> list[Completion]:
    sequences = np.arange(len(plan.sequences))
    return list(engine.generate(plan, sequences, control or RunControl(), hooks))


TALK = [[[5, 6, 7], [8, 9], [10], [11, 12]], [[5, 6, 8], [9]]]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_every_turn_is_the_answer_to_all_ids_so_far(params: SamplingParams) -> None:
    """Also drawn: by the key of the turn's row, not of its conversation."""
    engine, alone = NaiveEngine(tiny.load_tiny()), NaiveEngine(tiny.load_tiny())
    found = run(engine, plan_of(TALK, params))
    at = iter(found)
    number = 0
    for sequence, turns in enumerate(TALK):
        ids: list[int] = []
        for turn, added in enumerate(turns):
            completion = next(at)
            assert (completion.sequence, completion.turn) == (sequence, turn)
            history = len(ids)
            ids = [*ids[:-1], *added] if ids and ids[-1] == added[0] else [*ids, *added]
            assert completion.token_ids == one_answer(alone, ids, params, f"row-{number}")
            assert completion.prompt_tokens == len(ids) and completion.cached_tokens == 0
            assert completion.state is not None
            assert completion.state.history_tokens == history
            ids += completion.token_ids
            assert completion.state.span == completion.state.kept_tokens == len(ids) - 1
            number += 1
    assert engine.counters.prefilled_tokens == sum(c.prompt_tokens for c in found)
    assert engine.notes == [RESENT_NOTE]


def one_answer(
    engine: NaiveEngine, prompt: list[int], params: SamplingParams, name: str
) -> tuple[int, ...]:
    """Of a plan with this prompt alone."""
    table = TokenTable.from_lists([prompt])
    plan = build_plan(table, [name], (params,), np.zeros(1, np.int64))
    (completion,) = engine.generate(plan, np.arange(1), RunControl())
    return completion.token_ids


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_conversation_goes_on_after_its_earlier_turns(done: int) -> None:
    engine = NaiveEngine(tiny.load_tiny())
    plan = plan_of(TALK)
    whole = run(engine, plan)
    before = [EarlierTurn(c.token_ids) for c in whole[:done]]
    hooks = EngineHooks(earlier_turns=lambda sequence: before if sequence == 0 else ())
    rest = run(engine, plan, hooks)
    told = [(c.sequence, c.turn, c.token_ids, c.prompt_tokens, c.state) for c in whole[done:]]
    assert [(c.sequence, c.turn, c.token_ids, c.prompt_tokens, c.state) for c in rest] == told


def test_what_fills_the_window_is_an_error_and_the_answer_before_gets_what_is_left() -> None:
    """3 + 3, 2 + 4, 1: of 15 tokens two are left for the third answer, none for a fourth."""
    engine = EchoEngine()
    found = run(engine, plan_of(TALK, eviction=Eviction(window=15)))
    assert [len(c.token_ids) for c in found] == [3, 4, 2, 0, 3, 4]
    assert [c.error_type for c in found] == [None, None, None, "ContextExceeded", None, None]
    assert "17 tokens" in str(found[3].error_message)
    longer = run(engine, plan_of([[*TALK[0], [1], [2]]], eviction=Eviction(window=15)))
    assert [c.error_type for c in longer[3:]] == [
        "ContextExceeded", "PriorTurnFailed", "PriorTurnFailed"
    ]  # fmt: skip
    assert [c.turn for c in longer] == [0, 1, 2, 3, 4, 5]


def test_the_max_length_of_the_model_counts_all_that_was_said_before() -> None:
    """3 + 3, then 2 + 2: of 10 tokens none is left for a third turn."""
    params = SamplingParams(max_new_tokens=7, rules='{"max_length": 10}')
    found = run(EchoEngine(), plan_of(TALK, params))
    assert [len(c.token_ids) for c in found] == [3, 2, 0, 0, 3, 3]
    assert [c.error_type for c in found if c.error_type] == ["ContextExceeded", "PriorTurnFailed"]
    assert "max_length" in str(found[2].error_message)


def test_a_drain_ends_a_conversation_after_the_turn_that_it_is_at() -> None:
    drained: list[Completion] = []
    control = RunControl(should_drain=lambda: len(drained) == 2)
    plan = plan_of(TALK)
    for completion in EchoEngine().generate(plan, np.arange(2), control):
        drained.append(completion)
    assert [(c.sequence, c.turn) for c in drained] == [(0, 0), (0, 1)]


def test_an_engine_that_evicts_nothing_refuses_to() -> None:
    plan = plan_of(TALK, eviction=Eviction("window", budget_tokens=12, window=64))
    with pytest.raises(EngineError, match="evicts nothing"):
        run(EchoEngine(), plan)


class FakeVllm:
    """Answers requests by ids alone, one token of patience each; see `VllmEngine._engine`."""

    def __init__(self, most: int, refuses: int = 0) -> None:
        self.asked: list[tuple[str, list[int], str]] = []
        self._waiting: list[tuple[str, list[int]]] = []
        self._most, self._refuses = most, refuses

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        if len(prompt["prompt_token_ids"]) == self._refuses:
            raise ValueError("too long for me")
        self.asked.append((name, prompt["prompt_token_ids"], prompt["cache_salt"]))
        self._waiting.append((name, prompt["prompt_token_ids"]))

    def step(self) -> list[Any]:
        name, prompt = self._waiting.pop(0)
        answer = SimpleNamespace(token_ids=prompt[-self._most :][::-1], finish_reason="length")
        output = SimpleNamespace(
            request_id=name, finished=True, outputs=[answer], metrics=None,
            prompt_token_ids=prompt, num_cached_tokens=len(prompt) // 2,
        )  # fmt: skip
        return [output]

    def abort_request(self, names: list[str]) -> None:
        assert names == []


def vllm_engine(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    """The engine as it is, on a vLLM that is none."""
    for name, said in (
        ("vllm", {"SamplingParams": SimpleNamespace}),
        ("vllm.exceptions", {"VLLMClientError": LookupError}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**said))
    engine = VllmEngine.__new__(VllmEngine)
    LocalEngine.__init__(engine)
    vars(engine).update(_engine=fake, _eos=[1], _max_waiting=3)
    return engine


def test_vllm_is_sent_the_history_with_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the echo engine is, which answers by the same rule; what it had cached it says itself."""
    fake = FakeVllm(4)
    plan = plan_of([*TALK, [[5, 6, 7, 8]], [[9], [9, 9]]])
    found = run(vllm_engine(fake, monkeypatch), plan)
    echo = run(EchoEngine(), plan)
    told = {(c.sequence, c.turn): (c.token_ids, c.prompt_tokens, c.state) for c in found}
    assert told == {(c.sequence, c.turn): (c.token_ids, c.prompt_tokens, c.state) for c in echo}
    assert all(c.cached_tokens == c.prompt_tokens // 2 for c in found)
    assert sorted(len(ids) for _, ids, _ in fake.asked) == sorted(c.prompt_tokens for c in echo)


def test_what_vllm_refuses_ends_its_conversation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(TALK)
    found = run(vllm_engine(FakeVllm(4, refuses=8), monkeypatch), plan)
    errors = {(c.sequence, c.turn): c.error_type for c in found}
    assert errors == {
        (0, 0): None, (0, 1): "RefusedByVllm", (0, 2): "PriorTurnFailed",
        (0, 3): "PriorTurnFailed", (1, 0): None, (1, 1): None,
    }  # fmt: skip
