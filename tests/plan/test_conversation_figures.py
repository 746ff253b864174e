"""What carrying conversations is worth, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.plan.caching import computed_by_blocks
from pipeline.plan.conversation_figures import ConversationFigures, count_conversations, histories
from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction
from pipeline.plan.frames import plan_frame, tree_frame
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.summary import KVLimits, hash_plan, summarise
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

PARAMS = (SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=10))
NAMES = [f"row-{number}" for number in range(7)]
ROWS = [[1, 2, 3, 9], [7, 8], [], [7], [1, 2, 3, 4], [1, 2, 3, 4], [6, 6, 6]]
CHAINS = Chains(np.array([0, 3, 5, 6]), np.array([5, 1, 3, 0, 6, 4]), np.array([2, 0, 1]))


def plan_of(eviction: Eviction = Eviction(window=20)) -> Plan:  # noqa: B008
    """Conversation a in rows 5, 1, 3, b in rows 0, 6, c in row 4; row 2 cannot run; answers have 4
    tokens, that of row 3 has 10."""
    chosen = np.array([0, 0, 0, 1, 0, 0, 0])

    def build(table: TokenTable, kinds: np.ndarray) -> Plan:
        return build_plan(table, NAMES, PARAMS, chosen, min_prefix_tokens=2, kind_of_row=kinds)

    table = TokenTable.from_lists(ROWS)
    return plan_conversations(partial(build), table, NAMES, chosen, CHAINS, eviction)


def count(eviction: Eviction = Eviction(window=20), **more: Any) -> ConversationFigures:  # noqa: B008
    found = count_conversations(plan_of(eviction), more.get("bytes_per_token"))
    assert found is not None
    return found


def test_histories_are_all_that_was_said_before() -> None:
    plan = plan_of()
    assert plan.conversations is not None
    prompts, ends = histories(plan, plan.conversations)
    by_row = dict(
        zip(plan.conversations.row.tolist(), zip(prompts, ends, strict=True), strict=True)
    )
    assert by_row == {
        4: (4, 8), 5: (4, 8), 1: (4 + 4 + 2, 14), 3: (14 + 1, 25), 0: (4, 8), 6: (8 + 3, 15),
    }  # fmt: skip


def test_figures_are_those_counted_by_hand() -> None:
    found = count(bytes_per_token=10)
    assert (found.conversations, found.turns, found.most_turns) == (3, 6, 3)
    assert found.new_tokens == 4 + 2 + 1 + 4 + 3 + 4 and found.answer_tokens == 5 * 4 + 10
    assert found.carried_tokens == 5 + (2 + 1) + (1 + 1) + (3 + 1)
    assert found.resent_tokens == 4 + 4 + 10 + 15 + 4 + 11
    assert (found.longest_tokens, found.window_tokens, found.turns_beyond_window) == (25, 20, 1)
    assert (found.state_tokens, found.state_bytes) == (20, 200)
    assert found.to_json()["text"].startswith(
        "as many as 1 turns may exceed the model's context of 20"
    )


@pytest.mark.parametrize(
    ("budget", "window", "beyond", "says"),
    [
        (12, 20, (1, 3), None),
        (12, 30, (0, 3), "so --evict none would answer all turns, exactly"),
        (25, 30, (0, 0), "so nothing is evicted: --evict none is as good, and exact"),
    ],
)
def test_a_budget_is_compared_with_what_conversations_need(
    budget: int, window: int, beyond: tuple[int, int], says: str | None
) -> None:
    found = count(Eviction("oldest", budget, window))
    assert (found.turns_beyond_window, found.turns_beyond_budget) == beyond
    text = found.to_json()["text"]
    assert (says is None and text is None) or (says is not None and says in text)
    assert found.state_tokens == min(budget, 25) and found.state_bytes is None


def test_nothing_is_told_without_conversations() -> None:
    plan = build_plan(TokenTable.from_lists([[1]]), ["a"], PARAMS, np.zeros(1, np.int64))
    assert count_conversations(plan, 1) is None
    assert summarise(plan, ["a"], KVLimits(None, 1, None)).conversations is None


def test_the_summary_counts_what_is_said_before_as_prompt() -> None:
    plan = plan_of()
    found = summarise(plan, NAMES, KVLimits(10, 8, 1000))
    assert (found.rows, found.rows_rejected, found.sequences) == (7, 1, 3)
    assert (found.prompt_tokens, found.unique_tokens, found.max_new_tokens) == (48, 14, 30)
    assert found.saving == 1 - 14 / 48 and found.gain_bound == (48 + 30) / (14 + 30)
    assert (found.groups, found.singletons) == (1, 0)
    # What three share, then the rest of each; the last token of an answer counts, as elsewhere.
    assert found.peak_kv_bytes == 10 * (3 + 5 + 12 + 18)
    assert found.conversations is not None and found.conversations["at_once"] == 3
    assert found.saving_in_given_order["rows"] == 3
    tight = summarise(plan, NAMES, KVLimits(10, 8, 10 * (3 + 5 + 17)))
    assert tight.rows_at_once == 1


def test_what_decides_answers_is_in_the_hash() -> None:
    plan = plan_of()
    turns = plan.conversations
    assert turns is not None
    others = [
        plan,
        replace(plan, conversations=None),
        replace(plan, conversations=replace(turns, row=turns.row[::-1])),
        replace(plan, conversations=replace(turns, bounds=np.array([0, 2, 4, 6]))),
        replace(plan, conversations=replace(turns, system_tokens=np.array([0, 0, 1]))),
        *(plan_of(Eviction("oldest", budget, 20)) for budget in (11, 12)),
    ]
    assert len({hash_plan(other, NAMES) for other in others}) == len(others)


def test_the_table_of_the_plan_has_turns_in_order_and_copies_none() -> None:
    frame = plan_frame(plan_of(), NAMES)
    assert frame["row_index"].to_list() == [4, 5, 1, 3, 0, 6, 2]
    assert frame["turn"].to_list() == [0, 0, 1, 2, 0, 1, None]
    assert frame["max_new_tokens"].to_list() == [4, 4, 4, 10, 4, 4, None]
    assert frame["prompt_tokens"].to_list() == [4, 4, 2, 1, 4, 3, 0]
    assert frame["dedup_of"].is_null().all()
    assert frame["prompt"].to_list() == [0, 0, 0, 0, 1, 1, None]
    assert tree_frame(plan_of()).filter(pl.col("start") == 0)["rows"].to_list() == [3]


@pytest.mark.parametrize(
    ("block", "first", "later"),
    [(1, 5, 3 + 2 + 4), (4, 4 + 4, (10 - 4) + (15 - 12) + (11 - 4)), (256, 12, 10 + 15 + 11)],
)
def test_later_turns_find_whole_blocks_of_what_was_said_before(
    block: int, first: int, later: int
) -> None:
    """Seen red: blocks of 256 tokens saved as much as single tokens, in conversations of fewer."""
    assert computed_by_blocks(plan_of(), block) == first + later
