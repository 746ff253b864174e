"""Faults of the kind that conversations can have that give up tokens, planted on purpose.

| fault | what happens |
|---|---|
| shift +1, shift -1 | kept tokens stand one position from where they should, but the newest run |
| sink dropped | the oldest run that is kept is seen by nobody |
| run twice | most of the oldest run is seen a second time, by another view |
| stale | new tokens are computed at the number of kept ones; older keys stay where they were made |

What queries see is spoilt, and nothing else: what is kept, measured and written down is as it was.
See docs/audits.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, Literal

from torch import Tensor

from pipeline.engine.conversation import Conversation, KeptRun, TurnPlacement
from pipeline.engine.forward import Forward
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine

EvictionFault = Literal["shift +1", "shift -1", "sink dropped", "run twice", "stale"]
EVICTION_FAULTS: Final[tuple[EvictionFault, ...]] = (
    "shift +1", "shift -1", "sink dropped", "run twice", "stale"
)  # fmt: skip
_OUT_OF_SIGHT: Final = 1 << 30
Runs = Callable[[TurnPlacement], list[KeptRun]]


@contextmanager
def planted(engine: PrefixEngine, fault: EvictionFault | None) -> Iterator[PrefixEngine]:
    """The engine with a fault, for one conversation at a time; all others have it as well until
    this ends."""
    right: Runs = TurnPlacement.seen_runs
    latest: list[Conversation] = []

    def wrong(place: TurnPlacement) -> list[KeptRun]:
        latest[:] = [place.conversation]
        runs = right(place)
        return runs if fault is None or len(runs) < 2 else _spoil(runs, fault)

    backend = engine.backend
    if fault == "stale":
        backend = replace(backend, forward=_StaleForward(backend.forward, latest))
    setattr(TurnPlacement, "seen_runs", wrong)  # noqa: B010
    try:
        yield PrefixEngine(engine.loaded, engine.settings, backend, engine.costs)
    finally:
        setattr(TurnPlacement, "seen_runs", right)  # noqa: B010


def _spoil(runs: list[KeptRun], fault: EvictionFault) -> list[KeptRun]:
    first, *rest = runs
    if fault in ("shift +1", "shift -1"):
        by = 1 if fault == "shift +1" else -1
        return [*(run._replace(shift=run.shift + by) for run in runs[:-1]), runs[-1]]
    if fault == "sink dropped":
        return [first._replace(shift=_OUT_OF_SIGHT), *rest]
    slots = first.slots
    if fault == "run twice" and first.length > 1:
        less = slots._replace(low=slots.low + 1, position=slots.position + 1)
        return [first, first._replace(slots=less, shift=first.shift or 1, is_shared=False), *rest]
    return runs


class _StaleForward:
    """Another forward, whose tokens stand where the cache's length says."""

    def __init__(self, forward: Forward, latest: list[Conversation]) -> None:
        self.name = forward.name
        self._forward = forward
        self._latest = latest

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        for conversation in self._latest:
            gone = conversation.computed - conversation.num_kept
            batch = replace(batch, position_ids=batch.position_ids - gone + conversation.offset)
        return self._forward(batch, cache, keep)
