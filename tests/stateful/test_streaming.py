"""An arm on streams: what stays before each turn, and answers that are in the history as ids."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

from pipeline.stateful.arms import LIMIT, TOP, Arm, all_arms, headline_arms
from pipeline.stateful.streaming import Answered, stream_arm
from tests.stateful.models import build_llama, draw_group
from tests.sweeps import sweep

MODEL, GROUP = build_llama(), draw_group()


@cache
def run(*arm: object) -> list[Answered]:
    return stream_arm(MODEL, Arm(*arm), GROUP, 0)  # type: ignore[arg-type]


def said(answers: list[Answered]) -> torch.Tensor:
    return torch.stack([one.token_ids for one in answers], 1)


@torch.inference_mode()
def test_without_evictions_every_answer_is_that_of_plain_full_prefill() -> None:
    answers = run("none", "gap")
    ids = torch.zeros(3, 0, dtype=torch.int64)
    for turn, one in enumerate(answers):
        ids = torch.cat([ids, GROUP.prompts(turn)], 1)
        for place in range(2):
            logits = MODEL(ids, use_cache=False).logits[:, -1]
            assert torch.equal(one.token_ids[:, place], logits.argmax(-1))
            if not place:
                nll = -logits.log_softmax(-1)[torch.arange(3), GROUP.values(turn)]
                torch.testing.assert_close(one.nll, nll)
            ids = torch.cat([ids, one.token_ids[:, [place]]], 1)
        assert one.history == ids.shape[1] - GROUP.prompts(turn).shape[1] - 2


SMALL = [arm for arm in [*all_arms((48,)), Arm("window", "anew", 48)] if arm.keep == 48]
SOME = {arm.positions: arm for arm in SMALL} | {arm.evictor: arm for arm in reversed(SMALL)}


@pytest.mark.parametrize("arm", sweep(SMALL, SOME.values()))
def test_a_budget_of_all_evicts_nothing_and_a_small_one_is_kept(arm: Arm) -> None:
    everything = run(arm.evictor, arm.positions, 10_000, arm.gist)
    assert torch.equal(said(everything), said(run("none", "gap")))
    within = stream_arm(MODEL, arm, GROUP, 0)
    assert max(one.history for one in within) <= 49  # and the token that no forward has seen
    assert not torch.equal(said(within), said(everything))
    for one in within:
        assert (one.standing.skew > 0) <= (arm.positions == "stale")
        assert (one.standing.duplicate_positions > 0) <= (arm.positions == "stale")


def test_positions_say_what_a_turn_spans() -> None:
    gap, turned, auto = (run("sink-recent", p, 48) for p in ("gap", "rerotate", "auto"))
    total = sum(len(turn.prompt) + 2 for turn in GROUP.streams[0])
    assert max(one.standing.span for one in gap) == total - 2
    assert max(one.standing.span for one in turned) <= 49 + 40
    assert max(one.standing.span for one in auto) <= 0.9 * 256
    far = next(i for i, one in enumerate(gap) if one.standing.span > 0.9 * 256 - 2)
    assert torch.equal(said(auto)[:, : far - 1], said(gap)[:, : far - 1])
    assert max(one.standing.skew for one in run("sink-recent", "stale", 48)) >= 20


def test_one_run_is_the_same_under_gap_and_rerotate() -> None:
    for evictor in ("window", "oldest"):
        assert torch.equal(said(run(evictor, "gap", 48)), said(run(evictor, "rerotate", 48)))


def test_computed_anew_forgets_what_evicted_tokens_did() -> None:
    anew, kept = run("window", "anew", 48), run("window", "gap", 48)
    assert all(one.history <= 48 for one in anew)
    assert torch.equal(anew[0].token_ids, kept[0].token_ids)
    assert not torch.equal(torch.cat([one.nll for one in anew]), torch.cat([o.nll for o in kept]))


def test_at_each_token_no_more_than_the_limit_and_an_answer_is_there() -> None:
    few = run("attention-top", "rerotate", TOP, 0, True)
    ends = [one.standing.span for one in few]
    assert max(ends) == LIMIT + 1 and all(a <= b or b >= TOP for a, b in pairwise(ends))
    assert {arm.each_token for arm in headline_arms()} == {False, True}
