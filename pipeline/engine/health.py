"""How the cache of a conversation fares: numbers of a turn, the worst of it. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineError
from pipeline.records import EvictionEvent, TurnState

_GRAM = 4
_MOST_REPEATED = 0.5


class Standing(NamedTuple):
    """Where kept keys stand at one moment. `span`: tokens from the first to the one before the
    next query; `skew`: by how much a key stands in that query's future; `duplicate_positions`;
    `runs` of consecutive numbers; `gap_ratio`: share of numbers between first and last that are
    not there. Of heads that keep their own, the worst."""

    span: int
    skew: int
    duplicate_positions: int
    runs: int
    gap_ratio: float


def measure(
    at: NDArray[np.int64], query: int, numbers: NDArray[np.int64] | None = None
) -> Standing:
    """`at` int64 [n], or [layers, kv_heads, n]: positions where kept keys stand; `query`: where the
    next query stands. `numbers`, as `at`: those of the tokens in their conversation, rising, from
    which runs and gaps follow; None: where they stand is where they were born.
    """
    if not at.size:
        return Standing(0, 0, 0, 0, 0.0)
    rows = np.sort(at.reshape(-1, at.shape[-1]), axis=-1)
    kept = rows if numbers is None else np.sort(numbers.reshape(-1, numbers.shape[-1]), axis=-1)
    extent = kept[:, -1] - kept[:, 0] + 1
    return Standing(
        span=int(query - rows[:, 0].min()),
        skew=max(0, int(rows[:, -1].max()) + 1 - query),
        duplicate_positions=int((np.diff(rows) == 0).sum(-1).max()),
        runs=int((np.diff(kept) > 1).sum(-1).max()) + 1,
        gap_ratio=float(1 - (kept.shape[-1] / extent).min()),
    )


def is_degenerate(token_ids: Sequence[int], previous_token_ids: Sequence[int] = ()) -> bool:
    """Whether an answer says the same over and over, or what the answer before said.

    The longest stretch whose every four tokens were in the answer before covers over half of it.
    An answer of less than four tokens may be the same twice.
    """
    ids = tuple(token_ids)
    if len(ids) < _GRAM:
        return False
    if ids == tuple(previous_token_ids):
        return True
    seen = set[tuple[int, ...]]()
    longest = stretch = 0
    for low in range(len(ids) - _GRAM + 1):
        gram = ids[low : low + _GRAM]
        stretch = stretch + 1 if gram in seen else 0
        longest = max(longest, stretch + _GRAM - 1 if stretch else 0)
        seen.add(gram)
    return longest > _MOST_REPEATED * len(ids)


@dataclass
class TurnHealth:
    """Keeps the worst of a turn. `window`: tokens that the model can see; `history_tokens`: of
    earlier turns; `key_turns`: how often the most turned key was."""

    window: int
    history_tokens: int
    key_turns: int = 0
    prefill_peak: int = 0
    mass_kept: float = 1.0
    worst: Standing = Standing(0, 0, 0, 0, 0.0)
    eviction_log: list[EvictionEvent] = field(default_factory=list)

    def stands(self, standing: Standing) -> None:
        """Raises EngineError for what only a fault of the engine can bring about."""
        worst = self.worst
        self.worst = Standing(
            max(worst.span, standing.span),
            max(worst.skew, standing.skew),
            max(worst.duplicate_positions, standing.duplicate_positions),
            max(worst.runs, standing.runs),
            max(worst.gap_ratio, standing.gap_ratio),
        )
        if standing.skew:
            raise EngineError(
                f"a key of a conversation stands {standing.skew} positions in its query's future"
            )
        if standing.duplicate_positions:
            raise EngineError(
                f"{standing.duplicate_positions} keys of a conversation stand where others do"
            )

    def prefilled(self, held: int) -> None:
        """So many tokens were there once a part of the turn's prompt was computed."""
        self.prefill_peak = max(self.prefill_peak, held)

    def evicted(self, event: EvictionEvent, mass_kept: float = 1.0) -> None:
        """`mass_kept`: share of the newest query's weight that is on what stays."""
        self.eviction_log.append(event)
        self.mass_kept = min(self.mass_kept, mass_kept)

    def state(self, computed: int, kept: NDArray[np.int64], is_degenerate: bool) -> TurnState:
        """At the end of the turn: `computed` tokens so far, of which those with the numbers `kept`
        ([n], or [layers, kv_heads, n]) are there."""
        count = kept.shape[-1]
        worst = self.worst
        return TurnState(
            history_tokens=self.history_tokens,
            kept_tokens=count,
            evicted_tokens=computed - count,
            evictions=len(self.eviction_log),
            span=worst.span,
            ctx_frac=worst.span / self.window,
            skew=worst.skew,
            duplicate_positions=worst.duplicate_positions,
            runs=worst.runs,
            gap_ratio=worst.gap_ratio,
            sink_kept=bool(count) and bool((kept[..., 0] == 0).all()),
            mass_kept=self.mass_kept,
            key_turns=self.key_turns,
            prefill_peak=self.prefill_peak,
            degenerate=is_degenerate,
            eviction_log=tuple(self.eviction_log),
        )
