"""The arms of the study: what is given up, where the rest stands, and how much of it may stay.

| positions | a kept key stands | the next token stands |
|---|---|---|
| gap | where it was born | at its true place |
| rerotate | at its rank among the kept | behind the last |
| auto | as gap up to 0.9 windows, then as rerotate | |
| stale | where it was born | at the number of kept tokens, born there: a fault, for control |
| anew | what is kept is computed again for each turn, as if nothing had been before it | |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.plan.conversations import Eviction, Evictor

Positions = Literal["gap", "rerotate", "auto", "stale", "anew"]
BUDGETS = (32, 64, 128, 192)
EVICTORS: tuple[Evictor, ...] = (
    "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o", "snapkv",
    "random",
)  # fmt: skip
SINKS = 4
LIMIT = 192
"""Of the headline: tokens of history, or of all with `each_token`."""
ANEW = 128
"""Budget within which what is kept is computed again as well; that is slow."""
TOP = round(0.99 * LIMIT)
_AUTO: tuple[Evictor, ...] = ("sink-recent", "gist-recent", "attention-top")


@dataclass(frozen=True)
class Arm:
    """Before a turn at most `keep` tokens of history stay, of which the first `gist` are never
    given up by a gist; `keep` 0: all. `each_token`: what is read is fed one by one, and whenever
    more than `LIMIT` are there, so many are kept."""

    evictor: Evictor
    positions: Positions
    keep: int = 0
    gist: int = 0
    each_token: bool = False

    @property
    def name(self) -> str:
        """Of the tables."""
        kept: str = self.evictor
        if self.evictor == "gist" and self.gist < self.keep:
            kept = f"gist {self.gist}"
        if self.each_token:
            kept += " at each token"
        return f"{kept}, {self.positions}, {self.keep}" if self.keep else f"none, {self.positions}"

    def eviction(self, seed: int) -> Eviction:
        """As the engine's evictors take it."""
        return Eviction(
            self.evictor, self.keep, sink_tokens=SINKS, gist_tokens=self.gist, seed=seed
        )


def all_arms(budgets: Sequence[int] = BUDGETS, evictors: Sequence[Evictor] = EVICTORS) -> list[Arm]:
    """Every evictor under every policy within every budget; the headline's; what gives up
    nothing."""
    anew = [Arm("window", "anew", budget) for budget in budgets if budget == ANEW]
    grid = [*headline_arms(), *anew, *_grid(budgets, evictors)]
    return list(dict.fromkeys([Arm("none", "gap"), *grid]))


def headline_arms() -> list[Arm]:
    """A gist of a quarter of the limit, one of all of it, and the 99 % that got most attention, by
    the last query before a turn and by each."""
    return [
        arm
        for positions in ("stale", "gap", "rerotate")
        for arm in (
            Arm("gist", positions, LIMIT, LIMIT // 4),
            Arm("gist", positions, LIMIT, LIMIT),
            Arm("attention-top", positions, TOP),
            Arm("attention-top", positions, TOP, each_token=True),
        )
    ]


def _grid(budgets: Sequence[int], evictors: Sequence[Evictor]) -> Iterator[Arm]:
    policies: tuple[Positions, ...] = ("stale", "gap", "rerotate")
    for budget in budgets:
        for evictor in evictors:
            gist = {"gist": budget, "gist-recent": budget // 2}.get(evictor, 0)
            for positions in (*policies, "auto") if evictor in _AUTO else policies:
                yield Arm(evictor, positions, budget, gist)
