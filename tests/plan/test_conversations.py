"""Conversations in a plan: one sequence each, its first prompt in the tree, its turns in order."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import Eviction, join_ids
from pipeline.plan.plan import Plan, build_plan, noise_key
from pipeline.plan.subplan import only
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

GREEDY, SAMPLED = SamplingParams(max_new_tokens=4), SamplingParams(temperature=1.0, seed=3)
NAMES = [f"row-{number}" for number in range(7)]


def plan_of_two() -> Plan:
    """Conversation a in rows 5, 1, 3 and b in rows 0, 6; row 2 is rejected, 4 another's first."""
    rows = [[1, 2, 3, 9], [7, 8], [], [7], [1, 2, 3, 4], [1, 2, 3, 4], [6, 6, 6]]
    table = TokenTable.from_lists(rows)
    chosen = np.array([0, 0, 0, 1, 0, 0, 1])
    chains = Chains(np.array([0, 3, 5, 6]), np.array([5, 1, 3, 0, 6, 4]), np.array([2, 0, 1]))
    build = partial(build_plan_of, chosen)
    return plan_conversations(build, table, NAMES, chosen, chains, Eviction())


def build_plan_of(chosen: np.ndarray, table: TokenTable, kinds: np.ndarray) -> Plan:
    return build_plan(table, NAMES, (GREEDY, SAMPLED), chosen, kind_of_row=kinds)


def test_each_conversation_is_one_sequence_even_where_first_prompts_agree() -> None:
    plan = plan_of_two()
    assert plan.sequences.row.tolist() == [4, 5, 0]
    assert plan.sequence_of_row.tolist() == [2, 1, -1, 1, 0, 1, 2]
    assert plan.tree.edge_lengths.sum() == 5  # 1 2 3, 4, 9


def test_turns_come_in_order_with_their_parameters_and_keys() -> None:
    plan = plan_of_two()
    turns = plan.conversations
    assert turns is not None
    assert [turns.row[list(turns.turns(s))].tolist() for s in range(3)] == [[4], [5, 1, 3], [0, 6]]
    assert turns.params.tolist() == [0, 0, 0, 1, 0, 1]
    assert turns.noise_key.tolist() == [0, 0, 0, noise_key(3, "row-3"), 0, noise_key(3, "row-6")]
    assert turns.system_tokens.tolist() == [1, 2, 0]


def test_a_later_turn_computes_what_it_adds_and_the_last_token_before() -> None:
    plan = plan_of_two()
    assert plan.tokens_to_compute(np.arange(3)) == 5 + (2 + 1) + (1 + 1) + (3 + 1)
    assert plan.tokens_to_compute(np.array([1])) == 4 + (2 + 1) + (1 + 1)


def test_some_of_the_sequences_keep_their_turns() -> None:
    plan = only(plan_of_two(), np.array([0, 2]))
    assert plan.conversations is not None
    assert plan.conversations.bounds.tolist() == [0, 1, 3]
    assert plan.conversations.row.tolist() == [4, 0, 6]
    assert plan.sequence_of_row.tolist() == [1, -1, -1, -1, 0, -1, 1]


@pytest.mark.parametrize(
    ("last", "added", "fed"), [(5, [5, 1], [5, 1]), (4, [5, 1], [4, 5, 1]), (4, [], [4])]
)
def test_a_token_that_ends_the_answer_and_begins_the_turn_is_fed_once(
    last: int, added: list[int], fed: list[int]
) -> None:
    assert join_ids(last, np.array(added, ">u2")).tolist() == fed
