"""Audited turns of conversations that gave up tokens: computed again by an engine and by the slow
baseline; planted faults change what is said, and the baseline sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.verify.stateful_baseline import EvictionBaselines
from pipeline.engine.verify.stateful_faults import EVICTION_FAULTS, EvictionFault
from pipeline.engine.verify.story import Story, ToldTurn
from pipeline.engine.verify.told import answer_with_fault, told_logits
from pipeline.plan.conversations import Eviction, Evictor
from pipeline.records import EvictionEvent, SamplingParams
from tests.engine import tiny
from tests.engine.test_documents import engine_of
from tests.engine.test_evicting import apart
from tests.engine.test_turns import NEW_TOKENS, evicting, plan_of, run
from tests.sweeps import diagonal

GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)


def stories_of(eviction: Eviction, new: int = NEW_TOKENS) -> list[Story]:
    """Up to each turn of some conversations."""
    plan = plan_of(apart(20, 9)[:3], eviction, new)
    found = run(engine_of(), plan)
    return [
        Story.of(plan, turns[: last + 1]) for turns in found.values() for last in range(len(turns))
    ]


def prompt_of(story: Story) -> list[int]:
    ids: list[int] = story.ids[: int(story.chosen_at[0]) + 1].tolist()
    return ids


@pytest.mark.parametrize(
    ("evictor", "positions"),
    diagonal(("sink-recent", "attention-top", "h2o", "snapkv"), ("gap", "rerotate", "auto")),
)
def test_a_turn_is_computed_again_as_it_was(evictor: Evictor, positions: str) -> None:
    eviction = evicting(evictor, positions, window=48)
    stories = stories_of(eviction)
    assert any(story.log for story in stories)
    engine = engine_of()
    baselines = EvictionBaselines(NaiveEngine(engine.loaded), eviction)
    for share in (True, False):
        for story, got in zip(stories, told_logits(engine, stories, eviction, share), strict=True):
            answer = story.turns[-1].answer
            expected = baselines.of(story).forced_logits(prompt_of(story), answer)
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
            assert got.argmax(-1).tolist() == list(answer)


@pytest.mark.parametrize("positions", ["gap", "rerotate"])
def test_the_baseline_writes_the_same_answer_alone(positions: str) -> None:
    """Also where tokens go in the middle of it."""
    eviction = evicting("sink-recent", positions)
    stories = stories_of(eviction, new=24)
    inner = [
        story for story in stories
        if any(event.at > story.chosen_at[0] for event in story.turns[-1].log)
    ]  # fmt: skip
    assert inner
    baselines = EvictionBaselines(NaiveEngine(engine_of().loaded), eviction)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    for story in inner:
        alone = baselines.of(story).generate_one(prompt_of(story), params)
        assert alone == tuple(story.turns[-1].answer)
        replay = baselines.of(story).replay(prompt_of(story), alone, params, 0)
        assert replay.predicted.tolist() == list(alone)


@pytest.mark.parametrize(("fault", "positions"), diagonal(EVICTION_FAULTS, ("gap", "rerotate")))
def test_a_planted_fault_is_seen(fault: EvictionFault, positions: str) -> None:
    """It changes what the engine says, and the baseline says no to that."""
    eviction = evicting("sink-recent", positions)
    stories = [story for story in stories_of(eviction) if story.log][-4:]
    engine = engine_of()
    baselines = EvictionBaselines(NaiveEngine(engine.loaded), eviction)
    clean = answer_with_fault(engine, stories, eviction, 12, None)
    spoilt = answer_with_fault(engine, stories, eviction, 12, fault)

    def is_right(story: Story | None) -> bool:
        if story is None:
            return False
        answer = story.turns[-1].answer
        replay = baselines.of(story).replay(prompt_of(story), answer, GREEDY, 0)
        return bool((replay.predicted == np.array(answer)).all())

    assert all(map(is_right, clean))
    pairs = list(zip(spoilt, clean, strict=True))
    changed = [
        a for a, b in pairs if a is None or b is None or a.turns[-1].answer != b.turns[-1].answer
    ]
    assert changed and not any(map(is_right, changed))
    again = answer_with_fault(engine, stories, eviction, 12, None)
    assert again == clean  # nothing of it is left


def test_a_story_knows_its_ids_as_they_were_computed() -> None:
    stories = stories_of(Eviction("sink-recent", 500, 500))
    for story in stories:
        assert not story.log
        prompt, answer = prompt_of(story), story.turns[-1].answer
        engine = engine_of()
        logits = NaiveEngine(engine.loaded).forced_logits(prompt, answer)
        assert logits.argmax(-1).tolist() == list(answer)
    assert tiny.VOCABULARY > int(max(story.ids.max() for story in stories))
    assert torch.is_tensor(logits)


def test_a_story_tells_how_long_ago_what_went_was() -> None:
    """Three turns of ten tokens; the second one goes, or all of it in one head of two."""
    turns = [ToldTurn(range(4, 10), range(10, 15), 5, []) for _ in range(3)]
    story = Story(tuple(turns))
    assert story.starts == [0, 10, 21] and story.turns_since_gone is None
    gone, half = (EvictionEvent(21, kept) for kept in (((0, 12, 19, 21),), ((0, 21), (0, 9))))
    last = turns[2]._replace(log=[gone])
    assert Story((*turns[:2], last)).turns_since_gone == 1
    assert Story((*turns[:2], last._replace(log=[half]))).turns_since_gone is None
    first = last._replace(log=[EvictionEvent(21, ((0, 2, 10, 21),))])
    assert Story((*turns[:2], first)).turns_since_gone == 2
