"""In which order the arms were expected to come, and how far they were to get; hits and misses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_CLOSE = 0.02


@dataclass(frozen=True)
class Score:
    """Exact match, its standard error, and the share of the prompt that a row computes itself."""

    mean: float
    error: float
    own: float = 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Order:
    """`arms` with what stands between them: `≈` equal, `≥` not below, `>` above; all within two
    standard errors of their difference, or two points for `≈`."""

    task: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """`arm` is to reach `share` of full attention on `task`, at `most_own` of the prompt."""

    arm: str
    task: str
    share: float
    most_own: float = 1.0


_BRIDGE = (
    "full", ">", "CacheBlend 50% below", ">", "KVLink5", ">", "KVLink1", ">", "EPIC 2 below", ">",
    "KVLink0", "≈", "packet 8", "≈", "concat",
)  # fmt: skip
ORDERS = [
    Order("local", ("full", "≈", "KVLink5", "≈", "packet 8", "≥", "CacheBlend 30% below", "≥",
                    "EPIC 2 below", "≥", "concat below", "≥", "concat", ">", "no turn")),
    Order("order", ("full", ">", "no turn")),
    Order("bridge-2", _BRIDGE),
    Order("bridge-3", _BRIDGE),
]  # fmt: skip
BARS = [
    Bar("packet 8", "local", 0.95),
    *(Bar("KVLink5", task, 0.9, 0.1) for task in ("bridge-2", "bridge-3")),
]


def judge_order(
    order: Order, scores: Mapping[tuple[str, str], Score]
) -> list[tuple[str, str, str]]:
    """(task, expectation, what was found) of each neighbour in the order."""
    rows = []
    for first, sign, second in zip(
        order.arms[::2], order.arms[1::2], order.arms[2::2], strict=False
    ):
        a, b = scores[first, order.task], scores[second, order.task]
        hit = "hit" if _holds(a, sign, b) else "**miss**"
        rows.append((order.task, f"{first} {sign} {second}", f"{hit}: {a} and {b}"))
    return rows


def judge_bar(bar: Bar, scores: Mapping[tuple[str, str], Score]) -> tuple[str, str]:
    """(bar, what was found)."""
    reached, whole = scores[bar.arm, bar.task], scores["full", bar.task]
    share = reached.mean / whole.mean if whole.mean else 0.0
    is_hit = share >= bar.share and reached.own <= bar.most_own
    said = f"{bar.arm} at least {bar.share:.0%} of full attention on {bar.task}"
    if bar.most_own < 1:
        said += f", at most {bar.most_own:.0%} own tokens"
    found = f"{share:.1%} at {reached.own:.0%} own tokens"
    return said, f"{'hit' if is_hit else '**miss**'}: {found}"


def _holds(a: Score, sign: str, b: Score) -> bool:
    slack = 2 * math.hypot(a.error, b.error)
    difference = a.mean - b.mean
    if sign == "≈":
        return abs(difference) <= max(_CLOSE, slack)
    return difference > slack if sign == ">" else difference >= -slack
