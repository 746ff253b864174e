"""How the experiment measures: warm-ups, random order, medians with intervals. Knows no model.

```
 cells   (prompt, arm) pairs; a round runs every cell once, in an order of its own
 rounds  [ discarded, until >= `warmups` runs | measured, `repeats` of them ]
```

No arm is first in every round, so none pays for what the first call warms; what drifts (heat, other
programs) meets all arms alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Cell = TypeVar("Cell")
Result = TypeVar("Result")

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Protocol:
    """`repeats`: measured rounds; `warmups`: runs thrown away before them, at least."""

    repeats: int = 30
    warmups: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for counts that measure nothing."""
        if self.repeats < 1 or self.warmups < 0:
            raise ValueError(
                f"repeats must be at least 1 and warm-ups 0, not {self.repeats} and {self.warmups}"
            )


class Interval(NamedTuple):
    """A median and the bounds within which resampling leaves it 95 times of 100."""

    median: float
    low: float
    high: float


def run_rounds(
    runs: Mapping[Cell, Callable[[], Result]], protocol: Protocol
) -> dict[Cell, list[Result]]:
    """The results of `protocol.repeats` measured rounds, by cell, in the order of the rounds."""
    draw = random.Random(protocol.seed)
    results: dict[Cell, list[Result]] = {cell: [] for cell in runs}
    discarded = math.ceil(protocol.warmups / max(len(runs), 1))
    for number in range(discarded + protocol.repeats):
        for cell in draw.sample(list(runs), len(runs)):
            result = runs[cell]()
            if number >= discarded:
                results[cell].append(result)
    return results


def median_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The median of `values`, and its percentile bootstrap interval."""
    medians = _resampled_medians(values, np.random.default_rng(seed))
    return _interval(float(np.median(values)), medians)


def speedup_interval(
    baseline: Sequence[float], recycled: Sequence[float], seed: int = 0
) -> Interval:
    """The paper's S = (L_base - L_rec) / L_base in percent, of medians; both are resampled."""
    draw = np.random.default_rng(seed)
    base = _resampled_medians(baseline, draw)
    ours = _resampled_medians(recycled, draw)
    return _interval(
        100.0 * (1.0 - float(np.median(recycled)) / float(np.median(baseline))),
        100.0 * (1.0 - ours / base),
    )


def _resampled_medians(values: Sequence[float], draw: np.random.Generator) -> NDArray[np.float64]:
    """[resamples] medians of as many values drawn with replacement."""
    taken = draw.integers(0, len(values), (_RESAMPLES, len(values)))
    medians: NDArray[np.float64] = np.median(np.asarray(values, np.float64)[taken], axis=1)
    return medians


def _interval(median: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(median, float(low), float(high))
