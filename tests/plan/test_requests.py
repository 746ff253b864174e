"""Which rows ask which requests, and parts of a plan of scores."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.plan.frames import plan_frame
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.requests import Requests
from pipeline.plan.score_planning import ScoreFigures, by_rows, with_scores
from pipeline.plan.subplan import carve, only
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

Row = list[tuple[list[int], list[int]]]


def random_rows(draw: random.Random, count: int = 9) -> list[Row]:
    def ids(length: int) -> list[int]:
        return [draw.randrange(1, 30) for _ in range(length)]

    texts = [ids(1), ids(3), ids(2)]
    texts += [texts[1][:1] + ids(2), texts[1][:1]]
    shots = ids(8)
    rows: list[Row] = []
    for _ in range(count):
        context = shots + ids(draw.randrange(1, 4))
        rows.append([(context, draw.choice(texts)) for _ in range(draw.randrange(0, 4))])
    return rows


def requests_of(rows: list[Row]) -> tuple[Requests, TokenTable]:
    prompts = [p for row in rows for p in [c + k[:-1] for c, k in row] or [[]]]
    flat = [pair for row in rows for pair in row or [([], [0])]]
    requests = Requests(
        np.append(0, np.cumsum([max(1, len(row)) for row in rows])),
        np.array([len(context) for context, _ in flat]),
        np.array([ids[-1] for _, ids in flat]),
        np.array([len(ids) for _, ids in flat]),
        np.zeros(len(rows), np.int64),
    )
    return requests, TokenTable.from_lists(prompts)


def plan_of(rows: list[Row], tenant: np.ndarray | None = None) -> tuple[Plan, Requests]:
    requests, table = requests_of(rows)
    names = [str(row) for row in requests.row]
    params = (SamplingParams(max_new_tokens=1),)
    plan = build_plan(table, names, params, np.zeros(len(table), np.int64), tenant)
    return with_scores(plan, requests), requests


def read_of(plan: Plan) -> dict[tuple[int, ...], set[tuple[int, tuple[int, ...]]]]:
    """By prompt and request, the tokens that are read and where, by the scores alone."""
    scores = plan.scores
    assert scores is not None
    found: dict[tuple[int, ...], set[tuple[int, tuple[int, ...]]]] = {}
    for sequence in range(len(plan.sequences)):
        prompt = tuple(plan.prompt_token_ids(sequence).tolist())
        path = plan.tree.path(int(plan.tree.terminal[plan.sequences.prompt[sequence]]))
        for place in range(*scores.bounds[sequence : sequence + 2].tolist()):
            targets = scores.target_of_token[slice(*scores.token_bounds[place : place + 2])]
            points = scores.target_point[targets]
            at = scores.point_position[points]
            nodes = scores.point_node[points]
            assert set(nodes.tolist()) <= set(path)
            assert (plan.tree.start[nodes] <= at).all() and (at < plan.tree.end[nodes]).all()
            assert np.array_equal(at, len(prompt) - 1 - np.arange(len(at))[::-1])
            ids = tuple(scores.target_id[targets].tolist())
            found.setdefault(prompt, set()).add((int(scores.request[place]), ids))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_continuations_are_read_off_the_table(seed: int) -> None:
    rows = random_rows(random.Random(seed))
    requests, table = requests_of(rows)
    flat, counts = requests.continuations(table)
    tails = [ids for row in rows for _, ids in row or [([], [])]]
    assert counts.tolist() == [len(ids) for ids in tails]
    assert flat.tolist() == [number for ids in tails for number in ids]
    some = np.array([0, 3, 4])
    expected = [r for row in some.tolist() for r in requests.of_row(row)]
    assert requests.of_rows(some).tolist() == expected
    assert [int(requests.row[r]) for r in expected] == sorted(
        int(requests.row[r]) for r in expected
    )


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_a_plan_read_what_the_whole_one_does(seed: int) -> None:
    draw = random.Random(seed)
    plan, _ = plan_of(random_rows(draw))
    whole = read_of(plan)
    chosen = np.array(sorted(draw.sample(range(len(plan.sequences)), 4)))
    prompts = {tuple(plan.prompt_token_ids(s).tolist()) for s in chosen.tolist()}
    for part in (only(plan, chosen), carve(plan, chosen)):
        assert read_of(part) == {prompt: whole[prompt] for prompt in prompts}
        assert part.scores is not None
        heads = {p[: len(p) - k] for p in prompts for _, ids in whole[p] for k in range(len(ids))}
        assert part.scores.num_points == len(heads)
    again = only(only(plan, chosen), np.array([1, 2]))
    assert read_of(again).keys() <= prompts and len(again.sequences) == 2


def test_figures_count_each_position_once() -> None:
    context = [1, 2, 3]
    rows: list[Row] = [[(context, [4]), (context, [5]), (context, [4, 6])], [], [(context, [5])]]
    plan, requests = plan_of(rows)
    found = ScoreFigures.of(plan, requests)
    assert (found.requests, found.scored_tokens, found.scored_positions) == (4, 5, 2)
    assert (found.contexts, found.continuations) == (1, 3)
    assert (found.resent_tokens, found.resent_once_tokens) == (3 + 3 + 4 + 3, 3 + 4)
    assert plan.answer_tokens.sum() == 0
    frame = by_rows(plan_frame(plan, [str(r) for r in requests.row.tolist()]), requests)
    by_row = {row["row_index"]: row for row in frame.iter_rows(named=True)}
    assert [by_row[r]["prompt_tokens"] for r in range(3)] == [10, 0, 3]
    assert [by_row[r]["requests"] for r in range(3)] == [3, 1, 1]
    assert by_row[1]["sequence"] is None and by_row[0]["sequence"] == by_row[2]["sequence"] == 0


def test_a_continuation_is_another_one_behind_another_context() -> None:
    """Of the same ids, cut elsewhere, too."""
    rows: list[Row] = [[([1], [2, 3]), ([1, 2], [3]), ([1, 2], [3, 3])], [([5], [2, 3])]]
    plan, requests = plan_of(rows)
    found = ScoreFigures.of(plan, requests)
    assert (found.contexts, found.continuations) == (3, 4)


def test_tenants_share_no_point() -> None:
    rows: list[Row] = [[([1, 2], [3])], [([1, 2], [3])]]
    assert plan_of(rows)[0].scores.num_points == 1  # type: ignore[union-attr]
    plan, _ = plan_of(rows, np.array([0, 1]))
    assert plan.scores is not None and plan.scores.num_points == 2
