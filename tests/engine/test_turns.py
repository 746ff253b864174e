"""Conversations by the engine, against plain full prefill and masks that change with time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.engine.base import NO_HOOKS, EngineHooks, RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.model.model import use_own_attention
from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction, join_ids
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import Completion, EarlierTurn, EvictionEvent, SamplingParams
from tests.engine import tiny
from tests.engine.test_documents import engine_of

Conversation = list[list[int]]
"""The first prompt, and what each later turn adds."""
NEW_TOKENS = 7
SYSTEM = 6
KEEPS_ALL = Eviction()


def random_conversations(draw: random.Random, count: int = 5, turns: int = 4) -> list[Conversation]:
    """With one system prompt, some with first prompts that begin alike."""

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, tiny.VOCABULARY) for _ in range(length)]

    system, first = ids(SYSTEM), ids(8)
    return [
        [
            system + draw.choice([first, []]) + ids(draw.randrange(1, 9)),
            *(ids(draw.randrange(1, 9)) for _ in range(draw.randrange(turns))),
        ]
        for _ in range(count)
    ]


def plan_of(
    conversations: list[Conversation],
    eviction: Eviction = KEEPS_ALL,
    new: int = NEW_TOKENS,
    system: int = SYSTEM,
) -> Plan:
    """Rows lie turn by turn, not conversation by conversation."""
    rows = [(t, c) for c, turns in enumerate(conversations) for t in range(len(turns))]
    rows.sort()
    number = {pair: row for row, pair in enumerate(rows)}
    table = TokenTable.from_lists([conversations[c][t] for t, c in rows])
    bounds = np.append(0, np.cumsum([len(turns) for turns in conversations]))
    order = [number[t, c] for c, turns in enumerate(conversations) for t in range(len(turns))]
    chains = Chains(bounds, np.array(order), np.full(len(conversations), system))
    params = (SamplingParams(max_new_tokens=new, ignore_eos=True),)
    names, chosen = [str(row) for row in range(len(rows))], np.zeros(len(rows), np.int64)

    def build(some: TokenTable, kinds: NDArray[np.int64]) -> Plan:
        return build_plan(some, names, params, chosen, kind_of_row=kinds)

    return plan_conversations(build, table, names, chosen, chains, eviction)


def run(
    engine: PrefixEngine, plan: Plan, hooks: EngineHooks = NO_HOOKS
) -> dict[int, list[Completion]]:
    """By sequence, its turns."""
    found: dict[int, list[Completion]] = {s: [] for s in range(len(plan.sequences))}
    for completion in engine.generate(plan, np.arange(len(plan.sequences)), RunControl(), hooks):
        found[completion.sequence].append(completion)
    return found


def streams(plan: Plan, answers: Sequence[Sequence[int]], sequence: int) -> list[list[int]]:
    """Of each turn all ids up to its answer."""
    assert plan.conversations is not None
    turns = plan.conversations.turns(sequence)
    rows = [plan.table[int(plan.conversations.row[turn])] for turn in turns]
    found = [rows[0].tolist()]
    for added, answer in zip(rows[1:], answers, strict=False):
        before = [*found[-1], *answer[:-1]]
        found.append(before + join_ids(answer[-1], added).tolist())
    return found


def logits_of(engine: PrefixEngine, ids: list[int], kept: NDArray[np.bool_]) -> torch.Tensor:
    """[tokens, V]; token t sees those of `kept[t]`."""
    model = engine.loaded.model
    use_own_attention(model)
    mask = torch.zeros(kept.shape).masked_fill(~torch.from_numpy(kept), float("-inf"))
    with torch.inference_mode():
        output = model(torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False)
    return output.logits[0]


def seen_by_time(length: int, log: Sequence[EvictionEvent]) -> NDArray[np.bool_]:
    """[tokens, tokens] whether token t sees token j, with evictions of one set for all heads."""
    seen = np.tril(np.ones((length, length), bool))
    for event in log:
        runs = np.array(event.kept[0], np.int64).reshape(-1, 2)
        stays = np.zeros(event.at, bool)
        for low, high in runs.tolist():
            stays[low:high] = True
        seen[event.at :, : event.at] &= stays
    return seen


def check_gap(engine: PrefixEngine, plan: Plan) -> dict[int, list[Completion]]:
    """Every logit, where tokens stand where they were born."""
    hooks, logits = tiny.watch_logits()
    found = run(engine, plan, hooks)
    for sequence, turns in found.items():
        assert [turn.turn for turn in turns] == list(range(len(turns)))
        answers = [turn.token_ids for turn in turns]
        prompts = streams(plan, answers, sequence)
        assert [turn.prompt_tokens for turn in turns] == [len(ids) for ids in prompts]
        ids = [*prompts[-1], *answers[-1]]
        log = [event for turn in turns if turn.state for event in turn.state.eviction_log]
        expected = logits_of(engine, ids, seen_by_time(len(ids), log))
        number = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            for place in range(len(answer)):
                want, got = expected[len(prompt) + place - 1], logits[sequence, number]
                number += 1
                assert (got - want).abs().max() <= 1e-4 * want.abs().max(), (sequence, number)
    return found


def test_each_turn_is_plain_full_prefill_of_the_ids_so_far() -> None:
    engine = engine_of()
    plan = plan_of(random_conversations(random.Random(1)))
    found = check_gap(engine, plan)
    completions = [turn for turns in found.values() for turn in turns]
    fed = sum(turn.prompt_tokens - turn.cached_tokens for turn in completions)
    assert engine.counters.prefilled_tokens == fed == plan.tokens_to_compute(np.arange(5))
    assert engine.counters.recomputed_tokens == 0


def evicting(evictor: str, positions: str = "gap", budget: int = 30, **said: object) -> Eviction:
    known = {"window": 128, "evict_to": 0.7, "sink_tokens": 2, "gist_tokens": 12, **said}
    return Eviction(evictor, budget, positions=positions, **known)  # type: ignore[arg-type]


ONE_SET = ("window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "random")


@pytest.mark.parametrize("evictor", ONE_SET)
def test_gap_is_one_forward_with_a_mask_that_changes_with_time(evictor: str) -> None:
    engine = engine_of()
    conversations = random_conversations(random.Random(2), turns=9)
    found = check_gap(engine, plan_of(conversations, evicting(evictor)))
    states = [turn.state for turns in found.values() for turn in turns if turn.state]
    assert sum(state.evictions for state in states) > 3
    assert all(state.kept_tokens <= 30 for state in states)
    assert not any(state.skew or state.duplicate_positions for state in states)


def test_a_killed_conversation_goes_on_where_it_was() -> None:
    engine = engine_of()
    plan = plan_of(random_conversations(random.Random(3), turns=9), evicting("sink-recent"))
    whole = run(engine, plan)
    for cut in (1, 2, 3):
        done = {
            s: [EarlierTurn(t.token_ids, t.state.eviction_log) for t in turns[:cut] if t.state]
            for s, turns in whole.items()
        }
        left = [s for s, turns in whole.items() if len(turns) > cut]
        hooks = EngineHooks(earlier_turns=done.__getitem__)
        again = list(engine.generate(plan, np.array(left), RunControl(), hooks))
        assert sorted((c.sequence, c.turn) for c in again) == [
            (s, t.turn) for s in left for t in whole[s][cut:]
        ]
        for completion in again:
            before = whole[completion.sequence][completion.turn]
            assert completion.token_ids == before.token_ids
            assert completion.state is not None and before.state is not None
            assert completion.state.eviction_log == before.state.eviction_log


@pytest.mark.parametrize(
    "evictor", ["none", "sink-recent", pytest.param("random", marks=pytest.mark.slow)]
)
def test_conversations_that_give_way_come_back_as_they_were(evictor: str) -> None:
    conversations = random_conversations(random.Random(4), count=8, turns=6)
    eviction = Eviction() if evictor == "none" else evicting(evictor, budget=70)
    plan = plan_of(conversations, eviction, new=24 if evictor == "none" else 36)
    plenty = run(engine_of(), plan)
    slots, again = 250 if evictor == "none" else 150, []
    for spill in (None, 0):
        kv = engine_of().capabilities.kv
        assert kv is not None
        engine = engine_of(kv_budget=slots * kv.bytes_per_token, spill_memory=spill)
        found = run(engine, plan)
        answers = {s: [t.token_ids for t in turns] for s, turns in found.items()}
        assert answers == {s: [t.token_ids for t in turns] for s, turns in plenty.items()}
        again.append(engine.counters.recomputed_tokens)
    assert again[0] < again[1], "what is saved is not computed again"


@pytest.mark.parametrize("positions", ["gap", "rerotate", "auto"])
@pytest.mark.parametrize("evictor", ["h2o", "snapkv"])
def test_each_head_may_keep_its_own(evictor: str, positions: str) -> None:
    conversations = random_conversations(random.Random(5), count=6, turns=10)
    eviction = evicting(evictor, positions, budget=60, window=70, evict_to=0.9)
    states = [
        t.state for ts in run(engine_of(), plan_of(conversations, eviction)).values() for t in ts
    ]
    events = [event for state in states if state for event in state.eviction_log]
    assert events and all(len(event.kept) == 2 * 2 for event in events)  # layers x KV heads
    assert any(len(set(event.kept)) > 1 for event in events)
    assert all(state is not None and state.kept_tokens <= 60 for state in states)
    turned = max(state.key_turns for state in states if state)
    assert (turned > 0) == (positions != "gap")


def test_auto_moves_runs_together_before_they_lie_too_far_apart() -> None:
    conversations = random_conversations(random.Random(6), count=6, turns=12)
    spans = {}
    for positions in ("gap", "auto"):
        found = run(
            engine_of(), plan_of(conversations, evicting("sink-recent", positions, window=60))
        )
        spans[positions] = [t.state.span for ts in found.values() for t in ts if t.state]
    assert max(spans["gap"]) > 60 and 30 < max(spans["auto"]) <= 54


def failed_types(eviction: Eviction, conversations: list[Conversation]) -> list[str | None]:
    """Of the turns of the one conversation."""
    (turns,) = run(engine_of(), plan_of(conversations, eviction)).values()
    return [turn.error_type for turn in turns]


def test_a_turn_that_cannot_run_fails_and_so_do_later_ones() -> None:
    ids = list(range(4, 90))
    turns = [ids[:8], ids[:5], ids[:30], ids[:2]]
    late = [None, None]
    assert failed_types(Eviction(window=50), [turns]) == [
        *late,
        "ContextExceeded",
        "PriorTurnFailed",
    ]
    assert failed_types(evicting("window"), [turns]) == [*late, "TurnTooLong", "PriorTurnFailed"]
    cautious = evicting("window", budget=40, on_full="error")
    assert failed_types(cautious, [turns]) == [*late, "HistoryFull", "PriorTurnFailed"]


def test_a_drain_ends_the_turns_that_run_and_begins_none() -> None:
    plan = plan_of(random_conversations(random.Random(7), turns=9))
    engine, seen = engine_of(), list[Completion]()
    control = RunControl(should_drain=lambda: len(seen) > 4)
    for completion in engine.generate(plan, np.arange(len(plan.sequences)), control):
        seen.append(completion)
    whole = run(engine_of(), plan)
    assert 4 < len(seen) < sum(map(len, whole.values()))
    for completion in seen:
        assert completion.token_ids == whole[completion.sequence][completion.turn].token_ids
