"""Plans of conversations from token ids, for tests of engines and executors."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

GREEDY = SamplingParams(max_new_tokens=4)
NONE = Eviction()
Talk = Sequence[Sequence[int]]
"""The first prompt, then what each later turn adds."""


def plan_of(
    talks: Sequence[Talk], params: SamplingParams = GREEDY, eviction: Eviction = NONE
) -> Plan:
    """Rows are turns, named row-0, row-1, ... from the first of the first talk on."""
    rows = [turn for turns in talks for turn in turns]
    names = [f"row-{row}" for row in range(len(rows))]
    chosen = np.zeros(len(rows), np.int64)
    counts = [len(turns) for turns in talks]
    bounds = np.append(0, np.cumsum(counts))
    chains = Chains(bounds, np.arange(len(rows)), np.zeros(len(counts), np.int64))

    def build(table: TokenTable, kinds: np.ndarray) -> Plan:
        return build_plan(table, names, (params,), chosen, kind_of_row=kinds)

    table = TokenTable.from_lists(rows)
    return plan_conversations(build, table, names, chosen, chains, eviction)


def random_talks(draw: random.Random, count: int) -> list[Talk]:
    """1 to 6 turns; first prompts share much, little or nothing, or are the same."""
    base = [draw.randrange(2, 28) for _ in range(30)]

    def some(most: int) -> list[int]:
        return [draw.randrange(2, 28) for _ in range(draw.randint(1, most))]

    return [
        [base[: draw.choice([0, 10, 30])] + some(3)] + [some(5) for _ in range(draw.randrange(6))]
        for _ in range(count)
    ]
