"""What was expected of the arms before anything was measured; hits and misses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pipeline.plan.conversations import BY_WEIGHTS
from pipeline.stateful.arms import EVICTORS, LIMIT, TOP, Arm, Positions
from pipeline.stateful.found import Found, Share, difference
from pipeline.stateful.streams import WINDOW

CLOSE = 0.02
_HIGH = 0.9
_ZERO = 0.05  # of 64 values one is right by chance


class Verdict(NamedTuple):
    """`found`: "hit" or "**miss**", and the figures."""

    expected: str
    found: str


class Measured(NamedTuple):
    """`arms` by name; `same`: by (evictor, budget) the share of turns beyond the first window that
    got the same answer under "gap" and "rerotate"."""

    arms: Mapping[str, Found]
    same: Mapping[tuple[str, int], Share]

    def find(self, evictor: str, positions: str, keep: int) -> Found:
        """Of the grid."""
        return next(
            found for found in self.arms.values()
            if (found.evictor, found.positions, found.keep) == (evictor, positions, keep)
            and not found.arm.startswith("gist ")
        )  # fmt: skip

    @property
    def budgets(self) -> list[int]:
        """Of the grid, rising."""
        return sorted({found.keep for found in self.arms.values() if found.evictor == "window"})

    @property
    def evictors(self) -> list[str]:
        """Of the grid, in its order."""
        known = {found.evictor for found in self.arms.values() if found.keep in self.budgets}
        return [evictor for evictor in EVICTORS if evictor in known]


def headline(measured: Measured) -> Iterator[Verdict]:
    """A gist against the 99 % that got most attention, under each policy: what is right, and what
    is no answer at all."""
    policies: tuple[Positions, ...] = ("stale", "gap", "rerotate")
    for gist in (LIMIT, LIMIT // 4):
        for positions in policies:
            a = measured.arms[Arm("gist", positions, LIMIT, gist).name]
            for b in _tops(measured, positions):
                sign = ">" if positions == "stale" else "<"
                yield _compare(f"{a.arm} {sign} {b.arm}", (a.share(), sign, b.share()))
    for positions in policies:
        a = measured.arms[Arm("gist", positions, LIMIT, LIMIT).name]
        for b in _tops(measured, positions):
            sign = ">" if positions == "stale" else "≈"
            shares = b.share("malformed"), sign, a.share("malformed")
            yield _compare(f"no answer: {b.arm} {sign} {a.arm}", shares)


def _tops(measured: Measured, positions: Positions) -> list[Found]:
    arms = (Arm("attention-top", positions, TOP, each_token=each) for each in (False, True))
    return [measured.arms[arm.name] for arm in arms]


def expectations(measured: Measured) -> Iterator[Verdict]:
    """Everything else that was expected, in the order of the specification."""
    none = next(found for found in measured.arms.values() if found.evictor == "none")
    within, beyond = none.share(quarters=(0,)), none.share()
    yield _compare("none falls past the window", (within, ">", beyond))
    for rule in (_stale, _one_run, _with_sinks, _gist_and_recent, _by_weights):
        yield from _each(measured, rule)


def _each(
    measured: Measured, rule: Callable[[Measured, int], Iterator[Verdict]]
) -> Iterator[Verdict]:
    for budget in measured.budgets:
        yield from rule(measured, budget)


def _stale(measured: Measured, budget: int) -> Iterator[Verdict]:
    for evictor in measured.evictors:
        stale, true = (
            measured.find(evictor, positions, budget).share() for positions in ("stale", "rerotate")
        )
        sign = "≈" if evictor == "gist" else "<"
        yield _compare(f"{evictor}, {budget}: stale {sign} rerotate", (stale, sign, true))


def _one_run(measured: Measured, budget: int) -> Iterator[Verdict]:
    for evictor in ("window", "oldest"):
        if evictor in measured.evictors:
            same = measured.same[evictor, budget]
            hit = _word(same.mean > 0.999)
            yield Verdict(
                f"{evictor}, {budget}: gap and rerotate answer alike", f"{hit}: {same.mean:.2%}"
            )


def _with_sinks(measured: Measured, budget: int) -> Iterator[Verdict]:
    """Of the last quarter: what was kept from the beginning is far beyond the window there."""
    for evictor in ("sink-recent", "gist-recent"):
        if evictor in measured.evictors:
            gap, turned = (
                measured.find(evictor, positions, budget).share(quarters=(3,))
                for positions in ("gap", "rerotate")
            )
            said = f"{evictor}, {budget}: gap < rerotate once the span is beyond {WINDOW}"
            yield _compare(said, (gap, "<", turned))


def _gist_and_recent(measured: Measured, budget: int) -> Iterator[Verdict]:
    for evictor, known, unknown in (("gist", "gist", "recent"), ("sink-recent", "recent", "gist")):
        if evictor in measured.evictors:
            found = measured.find(evictor, "rerotate", budget)
            high, low = (found.share(kind=kind) for kind in (known, unknown))  # type: ignore[arg-type]
            hit = _word(high.mean >= _HIGH)
            yield Verdict(f"{evictor}, {budget}: {known} at least {_HIGH:.0%}", f"{hit}: {high}")
            hit = _word(low.mean <= _ZERO)
            yield Verdict(f"{evictor}, {budget}: {unknown} at most {_ZERO:.0%}", f"{hit}: {low}")


def _by_weights(measured: Measured, budget: int) -> Iterator[Verdict]:
    if "random" not in measured.evictors:
        return
    drawn = measured.find("random", "rerotate", budget).share()
    for evictor in BY_WEIGHTS:
        if evictor in measured.evictors:
            found = measured.find(evictor, "rerotate", budget).share()
            yield _compare(f"{evictor} > random, {budget}", (found, ">", drawn))


def _compare(said: str, order: tuple[Share, str, Share]) -> Verdict:
    a, sign, b = order
    return Verdict(said, f"{_word(holds(a, sign, b))}: {a} and {b}")


def holds(a: Share, sign: str, b: Share) -> bool:
    """`<`, `>`: beyond two standard errors of the difference; `≈`: within them, or two points."""
    less, slack = difference(a, b)
    if sign == "≈":
        return abs(less) <= max(CLOSE, slack)
    return less > slack if sign == ">" else less < -slack


def _word(is_hit: bool) -> str:
    return "hit" if is_hit else "**miss**"
