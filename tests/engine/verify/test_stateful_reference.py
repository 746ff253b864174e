"""The slow reference is what plain ways compute, where there are any; then what it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.engine.eviction import runs_of
from pipeline.engine.verify.slow_turns import GivenTurn, SlowTurn, SlowTurns
from pipeline.engine.verify.stateful_reference import (
    SlowConversation,
    SlowPositions,
    replayed_logits,
)
from pipeline.engine.verify.time_mask import masked_logits
from pipeline.plan.conversations import BY_HEAD, Eviction, Evictor
from pipeline.records import EvictionEvent
from tests.engine import families
from tests.engine.families import FAMILIES, Family
from tests.sweeps import diagonal, sweep

ROTARY = [family for family in FAMILIES if family.model_type not in ("gpt2", "opt")]
GROUPED = next(family for family in ROTARY if family.id == "llama, grouped heads")
WINDOWED = next(family for family in ROTARY if family.id == "mistral, window")
EVICTORS: tuple[Evictor, ...] = (
    "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o", "snapkv",
    "random",
)  # fmt: skip
IDS = np.random.default_rng(3).integers(4, 97, 60)
TWO_RUNS = [EvictionEvent(25, ((0, 4, 15, 25),)), EvictionEvent(40, ((0, 2, 20, 22, 30, 40),))]
ONE_RUN = [EvictionEvent(25, ((10, 25),)), EvictionEvent(40, ((20, 40),))]


def replayed(
    model: Any, positions: SlowPositions, log: Sequence[EvictionEvent], one_by_one: bool = False
) -> Tensor:
    return replayed_logits(SlowConversation(model, positions), IDS, log, one_by_one=one_by_one)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", families.some_quick(ROTARY), ids=lambda family: family.id)
def test_a_family_computes_what_plain_ways_do(family: Family) -> None:
    """No eviction: the model itself. "gap": a mask that changes with time, in one forward. One
    run: where it stands is no matter. In stretches or token by token, all the same."""
    model = families.load(family).model
    plain = masked_logits(model, IDS, [])
    with torch.inference_mode():
        same(model(torch.from_numpy(IDS)[None], use_cache=False).logits[0], plain)
    same(replayed(model, "gap", []), plain)
    same(replayed(model, "rerotate", [], True), plain)
    masked = masked_logits(model, IDS, TWO_RUNS)
    if not family.options.get("sliding_window"):  # those of 8 and 12 saw nothing of what went
        assert (masked - plain)[25:].abs().max() > 1e-2
    same(replayed(model, "gap", TWO_RUNS), masked)
    same(replayed(model, "gap", TWO_RUNS, True), masked)
    same(replayed(model, "rerotate", TWO_RUNS), replayed(model, "rerotate", TWO_RUNS, True))
    same(replayed(model, "rerotate", ONE_RUN), masked_logits(model, IDS, ONE_RUN))


@torch.no_grad()
def streaming_llama(model: Any, keep_after: dict[int, list[int]]) -> Tensor:
    """As StreamingLLM does it, by hand: keys unrotated, turned by their place in the cache."""
    config, body = model.config, model.model
    groups = config.num_attention_heads // config.num_key_value_heads
    kept: list[int] = []
    made: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in body.layers]
    logits = []
    for token, number in zip(IDS.tolist(), range(len(IDS)), strict=True):
        kept.append(number)
        cos, sin = body.rotary_emb(torch.zeros(1), torch.arange(len(kept))[None])
        x = body.embed_tokens(torch.tensor([[token]]))
        for layer, cache in zip(body.layers, made, strict=True):
            a, inner = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                f(inner).view(1, 1, -1, a.head_dim).transpose(1, 2)
                for f in (a.q_proj, a.k_proj, a.v_proj)
            )
            cache[number] = k, v
            keys, values = (torch.cat([cache[i][j] for i in kept], 2) for j in (0, 1))
            q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
            keys, values = (y.repeat_interleave(groups, 1) for y in (keys, values))
            p = torch.softmax(q @ keys.transpose(2, 3) * a.scaling, -1)
            x = x + a.o_proj((p @ values).transpose(1, 2).reshape(1, 1, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits.append(model.lm_head(body.norm(x))[0])
        kept = keep_after.get(number + 1, kept)
    return torch.cat(logits)


def test_rerotated_is_streaming_llm() -> None:
    model = families.load(GROUPED).model
    keep_after = {25: [*range(4), *range(15, 25)], 40: [0, 1, 20, 21, *range(30, 40)]}
    same(replayed(model, "rerotate", TWO_RUNS), streaming_llama(model, keep_after))


def test_stale_is_neither_and_its_keys_stand_in_the_future() -> None:
    model = families.load(GROUPED).model
    stale = SlowConversation(model, "stale")
    stale.feed(IDS[:25])
    stale.apply(TWO_RUNS[0])
    assert stale.query == 14 and max(stale.stands) == 24
    logits = replayed(model, "stale", TWO_RUNS)
    for positions in ("gap", "rerotate"):
        other = replayed(model, positions, TWO_RUNS)
        same(logits[:25], other[:25])
        assert (logits - other)[25:].abs().max() > 1e-2


def test_by_head_is_one_set_where_all_heads_keep_the_same() -> None:
    model = families.load(GROUPED).model
    by_head = [EvictionEvent(event.at, event.kept * 6) for event in TWO_RUNS]
    for positions in ("gap", "rerotate"):
        one = replayed(model, positions, TWO_RUNS)
        same(replayed(model, positions, by_head), one)


def test_by_head_each_head_sees_its_own() -> None:
    """Only the last layer's second KV head loses other tokens; there alone weights change."""
    model = families.load(GROUPED).model
    most, other = (0, 4, 15, 25), (5, 19)
    ways = []
    for runs in ([most] * 6, [most] * 5 + [other]):
        slow = SlowConversation(model)
        slow.feed(IDS[:25])
        slow.apply(EvictionEvent(25, tuple(runs)))
        ways.append((slow.feed(IDS[25:]), slow.weights(np.array([30]))))
    (one, weights), (two, changed) = ways
    assert (one - two).abs().max() > 1e-3
    is_same = [
        torch.equal(*pair)
        for pair in zip(weights.flatten(0, 1), changed.flatten(0, 1), strict=True)
    ]
    assert is_same == [True] * 5 + [False]


def test_auto_closes_the_gaps_once_the_span_is_too_wide() -> None:
    """Window 50: the 46th token is the first beyond 0.9 of it."""
    model = families.load(GROUPED).model
    slow = SlowConversation(model, "auto", window=50)
    auto = replayed_logits(slow, IDS, TWO_RUNS)
    assert slow.lies_together
    gap = replayed(model, "gap", TWO_RUNS)
    same(auto[:45], gap[:45])
    assert (auto - gap)[45].abs().max() > 1e-3
    expecting = SlowConversation(model, "auto", window=50)
    expecting.feed(IDS[:40])
    expecting.expect(5)
    assert not expecting.lies_together
    expecting.expect(6)
    assert expecting.lies_together


def conversation(seed: int = 0) -> list[GivenTurn]:
    draw = np.random.default_rng(seed)
    lengths = [(14, 6), (9, 8), (11, 30), (5, 7), (12, 6)]
    turns = [
        GivenTurn(draw.integers(4, 97, fed), draw.integers(4, 97, answer).tolist(), answer)
        for fed, answer in lengths
    ]
    return [turns[0]] + [
        turn._replace(fed=np.append(before.answer[-1], turn.fed))
        for before, turn in zip(turns, turns[1:], strict=False)
    ]


def ids_of(turns: Sequence[GivenTurn]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.append(turn.fed, turn.answer[:-1]) for turn in turns])


def run(
    model: Any, eviction: Eviction, positions: SlowPositions = "gap", system: int = 3
) -> list[SlowTurn]:
    slow = SlowConversation(model, positions, eviction.window)
    return list(SlowTurns(slow, eviction, system).run(conversation()))


@pytest.mark.parametrize(("evictor", "positions"), diagonal(EVICTORS, ("gap", "rerotate")))
def test_every_evictor_stays_within_its_budget_and_replays(
    evictor: Evictor, positions: SlowPositions
) -> None:
    model = families.load(GROUPED).model
    eviction = Eviction(evictor, budget_tokens=40, window=48, gist_tokens=10)
    turns = run(model, eviction, positions)
    log = [event for turn in turns for event in turn.log]
    assert log and {len(event.kept) for event in log} == {6 if evictor in BY_HEAD else 1}
    standing = [standing for turn in turns for standing in turn.standing]
    assert all(s.skew == 0 == s.duplicate_positions for s in standing)
    if positions == "rerotate":
        assert max(s.span for s in standing) <= 40
    ids = ids_of(conversation())
    again = replayed_logits(SlowConversation(model, positions), ids, log)
    at = np.cumsum([0] + [len(turn.fed) + len(turn.answer) - 1 for turn in conversation()])
    for turn, given, low in zip(turns, conversation(), at, strict=False):
        first = low + len(given.fed) - 1
        same(turn.logits, again[first : first + len(given.answer)])
    if evictor not in BY_HEAD and positions == "gap":
        same(again, masked_logits(model, ids, log))


@pytest.mark.parametrize("evictor", sweep(EVICTORS, ("oldest", "sink-recent", "h2o", "random")))
def test_a_budget_of_the_whole_history_evicts_nothing(evictor: Evictor) -> None:
    model = families.load(GROUPED).model
    count = len(ids_of(conversation()))
    turns = run(model, Eviction(evictor, budget_tokens=count + 1, window=200), "rerotate")
    plain = run(model, Eviction("none", window=200))
    for turn, expected in zip(turns, plain, strict=True):
        assert not turn.log
        same(turn.logits, expected.logits)


@pytest.mark.parametrize("evictor", ["oldest", "window"])
def test_one_run_is_the_same_function_wherever_it_stands(evictor: Evictor) -> None:
    """Also where layers have windows, and for as long as the stream is."""
    for family in (GROUPED, WINDOWED):
        model = families.load(family).model
        eviction = Eviction(evictor, budget_tokens=60, window=64)
        one, other = (run(model, eviction, how, system=0) for how in ("gap", "rerotate"))
        assert any(turn.log for turn in one)
        for a, b in zip(one, other, strict=True):
            assert a.log == b.log and all(s.runs == 1 for s in a.standing)
            same(a.logits, b.logits)


def test_stale_positions_are_measured_as_what_they_are() -> None:
    model = families.load(GROUPED).model
    eviction = Eviction("sink-recent", budget_tokens=40, window=48)
    worst = max(s.skew for turn in run(model, eviction, "stale") for s in turn.standing)
    assert worst >= 10


def test_what_a_turn_must_have_stays() -> None:
    """The system prompt, and the turn's own prompt in its long answer of 30 tokens."""
    model = families.load(GROUPED).model
    for evictor in EVICTORS:
        eviction = Eviction(evictor, budget_tokens=40, window=48, gist_tokens=4)
        given, low = conversation(), 0
        for turn, own in zip(run(model, eviction), given, strict=True):
            question = range(low, low + len(own.fed))
            for event in turn.log:
                for runs in event.kept:
                    kept = {
                        i for a, b in zip(runs[::2], runs[1::2], strict=True) for i in range(a, b)
                    }
                    assert evictor == "window" or {0, 1, 2} <= kept
                    assert event.at == low or set(question) <= kept
            low += len(own.fed) + len(own.answer) - 1


def test_a_log_is_read_as_it_was_written() -> None:
    slow = SlowConversation(families.load(GROUPED).model)
    slow.feed(IDS[:10])
    kept = np.array([0, 3, 4, 9])
    slow.apply(EvictionEvent(10, runs_of(kept)))
    assert slow.kept.tolist() == kept.tolist()
