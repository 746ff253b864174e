"""What the study found of its arms, counted in cells, and how sure a share of them is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.binomial import clopper_pearson_lower, clopper_pearson_upper
from pipeline.stateful.streams import WINDOW, Kind

AGES = (0, 64, 128, 256, 512)
"""Lower bounds of the classes of ages, in tokens."""
QUARTERS = range(4)
"""Windows of a stream; in the first one nothing is beyond the model's own window."""


@dataclass(frozen=True)
class Share:
    """`hits` of `asked`; `low` to `high` with 90 % confidence (Clopper and Pearson, 5 % on each
    side)."""

    hits: int
    asked: int

    @property
    def mean(self) -> float:
        """0 where nothing was asked."""
        return self.hits / self.asked if self.asked else 0.0

    @property
    def variance(self) -> float:
        """Of the mean, never quite 0: as with half a hit and half a miss more."""
        share = (self.hits + 0.5) / (self.asked + 1)
        return share * (1 - share) / max(1, self.asked)

    def __str__(self) -> str:
        if not self.asked:
            return "–"
        low = clopper_pearson_lower(self.hits, self.asked)
        high = clopper_pearson_upper(self.hits, self.asked)
        return f"{self.mean:.3f} ({low:.3f}–{high:.3f})"


class Cell(NamedTuple):
    """Questions of one kind, class of age and window of the stream. Of `asked` ones `exact` were
    answered right, `malformed` not by a value and an end, `repeated` as the question before;
    `nll`: sum over the true values, nats."""

    kind: Kind
    age: int
    quarter: int
    asked: int
    exact: int
    malformed: int
    repeated: int
    nll: float


@dataclass(frozen=True)
class Found:
    """Of one arm. Worst of all turns: `span`, `skew`, `duplicates`, `runs`; `history`: mean tokens
    of it that a turn beyond the first window saw."""

    arm: str
    evictor: str
    positions: str
    keep: int
    cells: tuple[Cell, ...]
    span: int
    skew: int
    duplicates: int
    runs: int
    history: float
    seconds: float

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Found:
        """From the JSON of the study."""
        cells = tuple(Cell(*cell) for cell in content["cells"])
        return cls(**(dict(content) | {"cells": cells}))

    def share(
        self, what: str = "exact", *, kind: Kind | None = None, age: int | None = None,
        quarters: Iterable[int] = (1, 2, 3),
    ) -> Share:  # fmt: skip
        """Of the questions beyond the first window, or in some windows."""
        cells = self._cells(kind, age, tuple(quarters))
        return Share(sum(getattr(cell, what) for cell in cells), sum(cell.asked for cell in cells))

    def nll(self, quarters: Iterable[int] = (1, 2, 3)) -> float:
        """Mean of the true values, in nats."""
        cells = self._cells(None, None, tuple(quarters))
        return sum(cell.nll for cell in cells) / max(1, sum(cell.asked for cell in cells))

    def _cells(self, kind: Kind | None, age: int | None, quarters: tuple[int, ...]) -> list[Cell]:
        return [
            cell
            for cell in self.cells
            if cell.quarter in quarters and kind in (None, cell.kind) and age in (None, cell.age)
        ]


def age_class(age: int) -> int:
    """The lower bound of the class that an age is of."""
    return max(bound for bound in AGES if bound <= age)


def quarter_of(place: int) -> int:
    """The window of the stream that a place lies in; what is left over counts with the last."""
    return min(place // WINDOW, QUARTERS[-1])


def difference(a: Share, b: Share) -> tuple[float, float]:
    """(a less b, two standard errors of it)."""
    return a.mean - b.mean, 2 * math.sqrt(a.variance + b.variance)
