"""The baseline of turns whose conversation gave up tokens: the same evictions, slowly.

An audit of such a run asks two things. Is what is kept computed right? That is asked of
`EvictionBaseline`, which gives up what the run's log says. How far is it from full attention? That
is asked of the honest baseline of all runs, `NaiveEngine`, where the whole history fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipeline.engine.base import Replay
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.verify.stateful_reference import SlowConversation, replayed_logits
from pipeline.engine.verify.story import Story
from pipeline.plan.conversations import Eviction
from pipeline.records import SamplingParams


class HasStory(Protocol):
    """A row that knows its conversation."""

    @property
    def story(self) -> Story | None: ...


class EvictionBaseline:
    """`Baseline` of the last turn of a story."""

    def __init__(self, naive: NaiveEngine, eviction: Eviction, story: Story) -> None:
        self._naive = naive
        self._eviction = eviction
        self._story = story

    def replay(
        self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, noise_key: int
    ) -> Replay:
        logits = self.forced_logits(prompt, output)
        return self._naive.judge(logits, prompt, output, params, noise_key)

    def forced_logits(self, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """See `NaiveEngine.forced_logits`; `prompt` is the story's."""
        story = self._story.answering(output)
        logits = replayed_logits(self._conversation(), story.ids, story.log, story.expected)
        return logits[story.chosen_at]

    def generate_one(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """Gives up what the run did, when it did."""
        writer = self._naive.writer(prompt, params)
        slow, due = self._conversation(), self._story.log
        prompted = self._story.ids[: self._story.chosen_at[0] + 1]
        inner = [event for event in due if event.at < len(prompted)]
        expected = self._story.expected
        logits = replayed_logits(slow, prompted, inner, expected)
        due = due[len(inner) :]
        while True:
            writer.choose(logits[-1])
            if writer.is_over:
                return tuple(writer.output)
            while due and due[0].at == slow.computed:
                slow.apply(due.pop(0))
            logits = slow.feed(writer.output[-1:])

    def _conversation(self) -> SlowConversation:
        eviction = self._eviction
        return SlowConversation(self._naive.loaded.model, eviction.positions, eviction.window)


class EvictionBaselines:
    """Makes them for turns of one run."""

    def __init__(self, naive: NaiveEngine, eviction: Eviction) -> None:
        self.naive = naive
        self.eviction = eviction

    def of(self, story: Story) -> EvictionBaseline:
        return EvictionBaseline(self.naive, self.eviction, story)

    def of_row(self, row: HasStory) -> EvictionBaseline:
        """Of an audited turn."""
        assert row.story is not None, "all rows of this run are turns"
        return self.of(row.story)
