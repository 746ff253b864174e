"""The study's batches against the engine's slow reference: one stream at a time, choosing anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.eviction import OBSERVED, Held, choose
from pipeline.engine.verify.stateful_reference import SlowConversation
from pipeline.plan.conversations import BY_HEAD
from pipeline.stateful.arms import Arm
from pipeline.stateful.streaming import stream_arm
from tests.stateful.models import build_llama, draw_group
from tests.sweeps import diagonal

KEEP = 48
GROUP = draw_group(rows=2, tokens=260)


def weights_of(slow: SlowConversation, evictor: str, prefill: range) -> Any:
    """As the evictor asks for them, of the reference's own attention."""
    if evictor == "attention-top":
        newest = slow.weights(np.array([slow.computed - 1]))
        return newest[:, :, -1].mean((0, 1)).numpy()
    if evictor == "h2o":
        return slow.means()
    if evictor == "snapkv":
        return slow.weights(np.array(prefill[-OBSERVED:])).mean(2).numpy()
    return None


@pytest.mark.parametrize(
    ("evictor", "positions"),
    diagonal(
        ("window", "gist-recent", "random", "attention-top", "h2o", "snapkv"),
        ("gap", "rerotate", "stale"),
    ),
)
def test_answers_and_likelihoods_are_those_of_the_reference(evictor: Any, positions: Any) -> None:
    arm = Arm(evictor, positions, KEEP, KEEP // 2 if evictor == "gist-recent" else 0)
    answers = stream_arm(build_llama(), arm, GROUP, 0)
    for row, stream in enumerate(GROUP.streams):
        slow = SlowConversation(build_llama(), positions)
        pending: list[int] = []
        starts: list[int] = []
        prefill, evictions = range(0), 0
        for turn, one in zip(stream, answers, strict=True):
            if slow.kept.shape[-1] > KEEP:
                kept = slow.by_head(slow.kept) if evictor in BY_HEAD else slow.kept
                weights = weights_of(slow, evictor, prefill)
                held = Held(kept, np.array(starts), 0, slow.computed, slow.computed, weights)
                mask = choose(arm.eviction(0), held, KEEP, row)
                slow.keep(kept[mask].reshape(*kept.shape[:-1], -1))
                evictions += 1
            starts.append(slow.computed)
            logits = slow.feed([*pending, *turn.prompt])[-1]
            prefill = range(starts[-1], slow.computed)
            said = one.token_ids[row].tolist()
            nll = -float(logits.log_softmax(-1)[turn.fact.value])
            assert nll == pytest.approx(float(one.nll[row]), abs=1e-3)
            assert int(logits.argmax()) == said[0]
            assert int(slow.feed(said[:1])[-1].argmax()) == said[1]
            pending = said[1:]
        assert evictions >= 4
    assert torch.isfinite(torch.cat([one.nll for one in answers])).all()
