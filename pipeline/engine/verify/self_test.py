"""Does cascade attention compute what this very model computes alone? Asked once, at load.

A handful of random prompts that share, extend and repeat each other go through the engine; every
logit that chose a token is compared with the model's own eager attention, teacher-forced. One more
prompt crosses a sliding window of at most 512 tokens; that wider ones are right is shown by
`tests/engine/test_families.py` alone, on tiny models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.segment_reference import SegmentReference
from pipeline.engine.verify.stateful_reference import SlowConversation, replayed_logits
from pipeline.engine.verify.story import Story
from pipeline.errors import EngineError, UsageError
from pipeline.model.families import has_experts
from pipeline.model.int8 import holds_int8
from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.segment_table import Segments
from pipeline.plan.token_table import TokenTable
from pipeline.records import Completion, SamplingParams

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit, as a share of the largest logit."""
_INT8_TOLERANCE = 5e-2
_ROUTED = 4.0
"""Times that in half precision behind routers: rounding alone reaches 0.1 in bfloat16 over 24
random layers of gpt-oss, a missing merge or window 0.4 and more in the tests' tiny ones."""
_WIDEST_CROSSED_WINDOW = 512
_BUDGET = 40

Seen = dict[tuple[int, int], Tensor]
"""Logits [V] by sequence and output position."""


def self_test(engine: PrefixEngine) -> float:
    """Worst difference, as a share of the largest logit. Raises EngineError above the tolerance,
    UsageError where the KV budget has no room for the test."""
    plan = _small_plan(engine.loaded.shape.vocabulary_size, _window_to_cross(engine))
    done, seen = _run(engine, plan)
    engine.loaded.model.set_attn_implementation("eager")
    return _judge(engine, [_difference(engine, plan, row, seen) for row in done])


def segment_self_test(engine: PrefixEngine, reuse: Reuse) -> float:
    """As `self_test`, of two rows that see the same documents in two orders, against the mode's
    slow reference."""
    shape = engine.loaded.shape
    draw = np.random.default_rng(0)
    preamble, one, two, question = (
        draw.integers(0, shape.vocabulary_size, length) for length in (7, 19, 11, 5)
    )
    rows = [[preamble, one, two, question], [preamble, two, one, question]]
    lengths = [[len(part) for part in row] for row in rows]
    table = TokenTable.from_lists([np.concatenate(row).tolist() for row in rows])
    params, every = (SamplingParams(max_new_tokens=3, ignore_eos=True),), np.zeros(2, np.int64)
    plan = build_plan(table, ["0", "1"], params, every)
    plan = with_documents(plan, Segments.from_lists(lengths), reuse, every)
    done, seen = _run(engine, plan)
    reference = SegmentReference(engine.loaded.model, reuse)

    def difference(row: Completion) -> Tensor:
        segments = rows[int(plan.sequences.row[row.sequence])]
        expected = reference.forced_logits(segments, row.token_ids).float()
        return _compare(engine, _seen_of(row, seen), expected)

    return _judge(engine, [difference(row) for row in done])


def eviction_self_test(engine: PrefixEngine, eviction: Eviction) -> float:
    """As `self_test`, of two conversations of three turns of which each gives up tokens once, with
    gaps left and closed, against the slow reference."""
    differences = []
    ways: tuple[Literal["gap", "rerotate"], ...] = ("gap", "rerotate")
    for positions in ways:
        small = replace(
            eviction, budget_tokens=_BUDGET, window=_BUDGET, evict_to=0.75, gist_tokens=8,
            positions=positions,
        )  # fmt: skip
        plan = _small_conversations(engine.loaded.shape.vocabulary_size, small)
        done, seen = _run(engine, plan)
        for sequence in range(len(plan.sequences)):
            turns = [completion for completion in done if completion.sequence == sequence]
            whole, number = Story.of(plan, turns), 0
            slow = SlowConversation(engine.loaded.model, positions)
            expected = replayed_logits(slow, whole.ids, whole.log).float()
            for last in range(len(turns)):
                at = Story(whole.turns[: last + 1]).chosen_at
                got = torch.stack([seen[sequence, number + i] for i in range(len(at))])
                differences.append(_compare(engine, got, expected[at]))
                number += len(at)
            if not whole.log:
                raise EngineError(f"self-test: {small.evictor} evicted nothing")
    return _judge(engine, differences)


def _run(engine: PrefixEngine, plan: Plan) -> tuple[list[Completion], Seen]:
    """All rows, and the logits that chose each of their tokens."""
    seen: Seen = {}

    def record(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        seen.update(zip(zip(sequences, positions, strict=True), logits.clone(), strict=True))

    every, hooks = np.arange(len(plan.sequences)), EngineHooks(on_logits=record)
    done = list(engine.generate(plan, every, RunControl(), hooks))
    for failed in (completion for completion in done if completion.error_type):
        if failed.error_type != "KVBudgetExceeded":
            raise EngineError(f"self-test: {failed.error_message}")
        raise UsageError(
            f"the KV budget of {engine.settings.kv_budget} bytes cannot hold even a prompt of "
            f"{plan.prompt_lengths.max()} tokens; raise --kv-budget"
        )
    return done, seen


def _judge(engine: PrefixEngine, differences: list[Tensor]) -> float:
    """The worst one. Raises EngineError above the tolerance."""
    model, worst = engine.loaded.model, float(torch.stack(differences).max())
    limit = _INT8_TOLERANCE if holds_int8(model) else _TOLERANCE[model.dtype]
    if has_experts(model.config) and model.dtype != torch.float32:
        limit *= _ROUTED
    if not worst <= limit:
        raise EngineError(
            f"self-test: cascade attention differs from the model's own by {worst:.1e} of the "
            f"largest logit (limit {limit:.0e}); reuse would be unsound for this model"
        )
    return worst


def _difference(engine: PrefixEngine, plan: Plan, row: Completion, seen: Seen) -> Tensor:
    """Of the row's logits from the model's own."""
    model = engine.loaded.model
    prompt = plan.prompt_token_ids(row.sequence).astype(np.int64).tolist()
    ids = torch.tensor([[*prompt, *row.token_ids[:-1]]], device=engine.loaded.device)
    keep = torch.arange(len(prompt) - 1, ids.shape[1], device=ids.device)
    with torch.inference_mode():
        expected = model(ids, use_cache=False, logits_to_keep=keep).logits[0].float()
    return _compare(engine, _seen_of(row, seen), expected)


def _seen_of(row: Completion, seen: Seen) -> Tensor:
    return torch.stack([seen[row.sequence, i] for i in range(len(row.token_ids))])


def _compare(engine: PrefixEngine, got: Tensor, expected: Tensor) -> Tensor:
    """Difference of a row's logits [tokens, V], as a share of the largest of those expected.

    Attention that is wrong shows in every token of a row. A rounding error in half precision shows
    in single ones, where attention is undecided between two places, or a router between experts,
    in the model's own fused attention as well.
    """
    model = engine.loaded.model
    by_token: Tensor = (got - expected).abs().amax(-1) / expected.abs().max().clamp_min(1e-6)
    if has_experts(model.config):
        return by_token.min()
    return by_token.max() if model.dtype == torch.float32 else by_token.median()


def _window_to_cross(engine: PrefixEngine) -> int:
    """Tokens of the model's sliding window, or 0 where it has none that is cheap to cross."""
    window: int = getattr(engine.loaded.model.config, "sliding_window", None) or 0
    context = engine.loaded.shape.context_length or 0
    return window if window <= min(_WIDEST_CROSSED_WINDOW, context - 40) else 0


def _small_conversations(vocabulary_size: int, eviction: Eviction) -> Plan:
    """Whose third turns do not fit beside the first two."""
    draw = np.random.default_rng(0)
    lengths = [20, 21, 8, 9, 9, 8]  # turn by turn of one conversation, then the other
    rows = [draw.integers(0, vocabulary_size, length).tolist() for length in lengths]
    table = TokenTable.from_lists(rows, vocabulary_size)
    params = (SamplingParams(max_new_tokens=4, ignore_eos=True),)
    ids, chosen = [str(i) for i in range(len(rows))], np.zeros(len(rows), np.int64)
    chains = Chains(np.array([0, 3, 6]), np.array([0, 2, 4, 1, 3, 5]), np.array([3, 3]))

    def build(firsts: TokenTable, kind_of_row: NDArray[np.int64]) -> Plan:
        return build_plan(firsts, ids, params, chosen, kind_of_row=kind_of_row)

    return plan_conversations(build, table, ids, chosen, chains, eviction)


def _small_plan(vocabulary_size: int, window: int) -> Plan:
    draw = np.random.default_rng(0)
    shared, short, own = (draw.integers(0, vocabulary_size, n) for n in (24, 3, 9))
    rows = [
        [*shared, *own],
        [*shared, *own, *short],
        [*shared, *short, *own],
        [*shared, *short],
        [*own],
    ]
    if window:  # its border lies inside the shared prefix when the row starts to decode
        rows.append([*shared, *draw.integers(0, vocabulary_size, max(window - 12, 10))])
    params = (SamplingParams(max_new_tokens=3, ignore_eos=True),)
    ids = [str(i) for i in range(len(rows))]
    table = TokenTable.from_lists(rows, vocabulary_size)
    return build_plan(table, ids, params, np.zeros(len(rows), np.int64))
