"""Told conversations by an engine: it goes on after their earlier turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.stateful_faults import EvictionFault, planted
from pipeline.engine.verify.story import Story
from pipeline.errors import EngineError
from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import EarlierTurn, SamplingParams


@dataclass(frozen=True, eq=False)
class ToldPlan:
    """A plan whose conversations are `stories`; that of a sequence is `story_of[sequence]`."""

    plan: Plan
    stories: Sequence[Story]
    story_of: NDArray[np.int64]

    @classmethod
    def of(
        cls, stories: Sequence[Story], eviction: Eviction, size: int, share: bool, ignore_eos: bool
    ) -> ToldPlan:
        """`size` of the vocabulary. Without `share` every story is a tenant of its own."""
        turns = [turn for story in stories for turn in story.turns]
        counts = [len(story.turns) for story in stories]
        story = np.repeat(np.arange(len(stories)), counts)
        params = tuple(
            SamplingParams(turn.max_new_tokens, seed=int(number), ignore_eos=ignore_eos)
            for turn, number in zip(turns, story, strict=True)
        )
        bounds, rows = np.append(0, np.cumsum(counts)), np.arange(len(turns))
        system = np.array([story.system_tokens for story in stories], np.int64)
        tenants = np.zeros(len(rows), np.int64) if share else story
        names = [str(row) for row in rows]

        def build(table: TokenTable, kinds: NDArray[np.int64]) -> Plan:
            return build_plan(table, names, params, rows, tenants, kind_of_row=kinds)

        table = TokenTable.from_lists([list(turn.added) for turn in turns], size)
        chains = Chains(bounds, rows, system)
        plan = plan_conversations(build, table, names, rows, chains, eviction)
        return cls(plan, stories, story[plan.sequences.row])

    def earlier(self, sequence: int) -> list[EarlierTurn]:
        """See `EngineHooks.earlier_turns`."""
        return self.stories[int(self.story_of[sequence])].earlier


def told_logits(
    engine: PrefixEngine, stories: Sequence[Story], eviction: Eviction, share: bool
) -> list[Tensor]:
    """The logits that choose each token of each story's last answer: [stories][n, V], model's
    dtype. Raises EngineError where one cannot run."""
    told = ToldPlan.of(stories, eviction, engine.loaded.shape.vocabulary_size, share, True)
    seen: list[list[Tensor]] = [[] for _ in stories]
    before = [sum(len(turn.answer) for turn in story.turns[:-1]) for story in stories]
    outputs = [story.turns[-1].answer for story in stories]

    def record(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        for sequence, position, row_logits in zip(sequences, positions, logits, strict=True):
            number = int(told.story_of[sequence])
            if position - before[number] == len(seen[number]) < len(outputs[number]):
                seen[number].append(row_logits.clone())

    def given(sequences: list[int], positions: list[int]) -> list[int]:
        tokens = []
        for sequence, position in zip(sequences, positions, strict=True):
            number = int(told.story_of[sequence])
            place = min(position - before[number], len(outputs[number]) - 1)
            tokens.append(int(outputs[number][place]))
        return tokens

    def is_over() -> bool:
        return all(map(len, seen)) and list(map(len, seen)) == list(map(len, outputs))

    hooks = EngineHooks(record, given, earlier_turns=told.earlier)
    control = RunControl(should_abort=is_over)
    for done in engine.generate(told.plan, np.arange(len(stories)), control, hooks):
        if done.error_type:
            raise EngineError(f"a turn of the audit cannot run: {done.error_message}")
    return [torch.stack(logits) for logits in seen]


def answer_with_fault(
    engine: PrefixEngine,
    stories: Sequence[Story],
    eviction: Eviction,
    max_new_tokens: int,
    fault: EvictionFault | None,
) -> list[Story | None]:
    """Each story with another, greedy last answer, by the engine with `fault` (None: as it is);
    None where it noticed by itself that something is wrong."""
    return [_answer(engine, story, eviction, max_new_tokens, fault) for story in stories]


def _answer(
    engine: PrefixEngine,
    story: Story,
    eviction: Eviction,
    max_new_tokens: int,
    fault: EvictionFault | None,
) -> Story | None:
    last = story.turns[-1]._replace(max_new_tokens=max_new_tokens)
    story = replace(story, turns=(*story.turns[:-1], last))
    told = ToldPlan.of([story], eviction, engine.loaded.shape.vocabulary_size, True, False)
    hooks = EngineHooks(earlier_turns=told.earlier)
    with planted(engine, fault) as faulty:
        try:
            (done,) = faulty.generate(told.plan, np.zeros(1, np.int64), RunControl(), hooks)
        except EngineError:
            return None
    if done.state is None:
        return None
    last = last._replace(answer=done.token_ids, log=done.state.eviction_log)
    return replace(story, turns=(*story.turns[:-1], last))
