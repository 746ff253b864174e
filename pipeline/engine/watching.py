"""What is noted of conversations while they are computed: queries, counts, the health of a turn.

Evictions go by how much attention tokens get, and no kernel says it. So the newest queries of each
conversation are noted as they pass through the layers, and weighed when tokens must go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.conversation import Conversation, KeptRun, TurnPlacement
from pipeline.engine.eviction import OBSERVED
from pipeline.engine.health import TurnHealth, measure
from pipeline.engine.kept_kv import KeptKV
from pipeline.engine.live import LiveRow
from pipeline.engine.observation import Observed, Observer, SeenSlots, Sums, attention_weights
from pipeline.engine.prefill import Chunk
from pipeline.engine.rotary import Rotary
from pipeline.plan.conversations import Eviction

_EVERY = 1 << 31


class _Glimpse(NamedTuple):
    """The query of a conversation's token `number`: the `place`-th that an observer noted."""

    observer: Observer
    place: int
    number: int


@dataclass(eq=False)
class Watch:
    """What is noted of a live conversation: its newest queries, and the health of its turn."""

    health: TurnHealth
    recent: deque[_Glimpse]
    sums: Sums | None
    begun: int
    answer: list[int] = field(default_factory=list)
    """The one before the current turn's."""
    pending: list[_Glimpse] = field(default_factory=list)
    """Queries that the sums will hold: counted together, which costs as much as one alone."""
    counted: int = 0
    """The first token whose query the sums do not hold. Those of a first prompt never do: it may
    be computed for others as well, and what is evicted must not depend on them."""


class _Noted(NamedTuple):
    """Tokens of a forward that are noted: at `at` among its tokens, and their `numbers` in the
    row's conversation."""

    row: LiveRow
    at: NDArray[np.int64]
    numbers: NDArray[np.int64]


class Watcher:
    """The conversations of one run of the engine."""

    def __init__(self, eviction: Eviction, kept: KeptKV) -> None:
        self._eviction = eviction
        self._kept = kept
        self._watched: dict[int, Watch] = {}
        last = {"none": 0, "h2o": _EVERY, "snapkv": OBSERVED}
        self._noted = last.get(eviction.evictor, 1)
        """As many of the newest tokens of a conversation in a forward."""

    @property
    def _rotary(self) -> Rotary:
        assert self._kept.rotary is not None, "nothing is evicted without"
        return self._kept.rotary

    def of(self, row: LiveRow) -> Watch:
        known = self._watched.get(row.sequence)
        if known is None or known.begun != conversation_of(row).begun:  # queries are seen again
            self._watched[row.sequence] = self._anew(conversation_of(row), known)
        return self._watched[row.sequence]

    def renew(self, row: LiveRow) -> None:
        """A turn begins to be noted; what was seen of queries stays."""
        self._watched[row.sequence] = replace(
            self.of(row), health=self._health(conversation_of(row))
        )

    def _anew(self, conversation: Conversation, known: Watch | None) -> Watch:
        sums = None
        if self._eviction.evictor == "h2o":
            arena = self._kept.arena
            sums = Sums(arena.shape[0], arena.shape[2], arena.device)
        recent: deque[_Glimpse] = deque(maxlen=min(self._noted, OBSERVED) or 1)
        before = (self._health(conversation), []) if known is None else (known.health, known.answer)
        return Watch(
            before[0],
            recent,
            sums,
            conversation.begun,
            before[1],
            counted=conversation.first_prompt,
        )

    def _health(self, conversation: Conversation) -> TurnHealth:
        return TurnHealth(self._eviction.window or conversation.most_slots, 0)

    def forget(self, row: LiveRow) -> None:
        """The conversation is over."""
        self._watched.pop(row.sequence, None)

    @contextmanager
    def watching_prefill(self, chunks: list[Chunk]) -> Iterator[Observer | None]:
        """Around a forward over `chunks`: notes what evictions go by, and what is there after it.
        Yields what the forward must be given."""
        noted: list[_Noted] = []
        low = 0
        for job, start, stop in chunks:
            if isinstance(job.target, LiveRow) and self._noted:
                first = max(start, stop - self._noted)
                at = low + np.arange(first - start, stop - start)
                numbers = np.arange(first, stop) + job.target.offset
                noted.append(_Noted(job.target, at, numbers))
            low += stop - start
        observer = self._observer(noted)
        yield observer
        for job, start, stop in chunks:
            if isinstance(job.target, LiveRow):
                self._prefilled(job.target, start, stop, job.is_repeat)
        self._note(observer, noted)

    @contextmanager
    def watching_decode(self, rows: list[LiveRow]) -> Iterator[Observer | None]:
        """As `watching_prefill`, around a step of `rows`, which feeds the last token of each."""
        noted = [
            _Noted(row, np.array([i]), np.array([conversation_of(row).computed]))
            for i, row in enumerate(rows)
            if self._noted
        ]
        observer = self._observer(noted)
        yield observer
        for row in rows:
            conversation = conversation_of(row)
            conversation.ids.append(row.token_ids[-1])
            conversation.computed += 1
            conversation.num_kept += 1
        self._note(observer, noted)

    def weights(self, row: LiveRow, runs: list[KeptRun]) -> Tensor | None:
        """[layers, kv_heads, queries, keys] of the newest queries; None before the first."""
        recent = [*self.of(row).recent]
        return attention_weights(self._seen_by(row, runs, recent)) if recent else None

    def count(self, row: LiveRow) -> None:
        """Before what the row keeps is changed: the sums hold all queries so far."""
        watch = self.of(row)
        if watch.sums is not None and watch.pending:
            runs = conversation_of(row).runs(row.place)
            watch.sums.add(self._seen_by(row, runs, watch.pending))
            watch.pending = []

    def measure(self, row: LiveRow) -> None:
        """Note where kept tokens stand. Raises EngineError where two stand in one place."""
        conversation = conversation_of(row)
        runs = conversation.runs(row.place)
        numbers, _ = joined(conversation, runs)
        stands = [np.broadcast_to(conversation.stands(run), _shape(numbers, run)) for run in runs]
        at = np.concatenate(stands, -1) if stands else np.zeros(0, np.int64)
        self.of(row).health.stands(measure(at, conversation.next_position, numbers))

    def _prefilled(self, row: LiveRow, low: int, high: int, is_repeat: bool) -> None:
        conversation = conversation_of(row)
        if isinstance(row.place, TurnPlacement):
            conversation.computed = high + conversation.offset
            conversation.num_kept += high - low
            if not is_repeat:
                self.of(row).health.prefilled(conversation.num_kept)

    def _note(self, observer: Observer | None, noted: list[_Noted]) -> None:
        """What a forward's observer has seen."""
        if observer is None:
            return
        place = 0
        for row, at, numbers in noted:
            watch, which = self.of(row), np.arange(place, place + len(at))
            place += len(at)
            self._count_later(row, observer, which, numbers)
            newest = zip(which.tolist(), numbers.tolist(), strict=True)
            watch.recent.extend(_Glimpse(observer, *pair) for pair in newest)

    def _count_later(
        self,
        row: LiveRow,
        observer: Observer,
        which: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ) -> None:
        """Queries of one forward, where they are counted: those of a prompt at once."""
        watch = self.of(row)
        which, numbers = (x[numbers >= watch.counted] for x in (which, numbers))
        if watch.sums is None or not len(numbers):
            return
        watch.counted = int(numbers[-1]) + 1
        if len(numbers) == 1:
            watch.pending.append(_Glimpse(observer, int(which[0]), int(numbers[0])))
        if len(numbers) > 1 or len(watch.pending) == OBSERVED:
            self.count(row)
        if len(numbers) > 1:
            runs = conversation_of(row).runs(row.place)
            watch.sums.add(self._observed(row, runs, observer, which, numbers))

    def _seen_by(self, row: LiveRow, runs: list[KeptRun], glimpses: list[_Glimpse]) -> Observed:
        """The queries of several forwards as those of one."""
        every = [glimpse.observer.layers for glimpse in glimpses]
        places = [glimpse.place for glimpse in glimpses]
        layers = [
            (torch.stack([q[at] for (q, _), at in zip(layer, places, strict=True)]), layer[0][1])
            for layer in zip(*every, strict=True)
        ]
        which = np.arange(len(glimpses))
        numbers = np.array([glimpse.number for glimpse in glimpses])
        observer = Observer(torch.from_numpy(which), layers)
        return self._observed(row, runs, observer, which, numbers)

    def _observer(self, noted: list[_Noted]) -> Observer | None:
        if not noted:
            return None
        at = np.concatenate([some.at for some in noted])
        return Observer(torch.from_numpy(at).to(self._kept.arena.device))

    def _observed(
        self,
        row: LiveRow,
        runs: list[KeptRun],
        observer: Observer,
        which: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ) -> Observed:
        """Queries `which` of an observer, of tokens `numbers`, and what the row keeps."""
        keys, _ = joined(conversation_of(row), runs)
        seen = [SeenSlots(run.slots.low, run.slots.high, run.shift) for run in runs]
        ahead = keys[..., None, :] > numbers[:, None]
        age = numbers[:, None] - keys if keys.ndim == 1 else None  # heads keep no window of theirs
        return Observed(observer, which, seen, self._kept.arena, self._rotary, ahead, age)


def conversation_of(row: LiveRow) -> Conversation:
    assert row.conversation is not None, "all rows of a plan with conversations have one"
    return row.conversation


def _shape(numbers: NDArray[np.int64], run: KeptRun) -> tuple[int, ...]:
    return (*numbers.shape[:-1], run.length)


def joined(
    conversation: Conversation, runs: Sequence[KeptRun]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of all their tokens, [n] or [layers, kv_heads, n], and the bounds of each run."""
    bounds = np.append(0, np.cumsum([run.length for run in runs])).astype(np.int64)
    widest = max((run.numbers for run in runs), key=lambda x: x.ndim, default=None)
    if widest is None:
        return np.zeros(0, np.int64), bounds
    parts = [np.broadcast_to(run.numbers, _shape(widest, run)) for run in runs]
    return np.concatenate(parts, -1), bounds
