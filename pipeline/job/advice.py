"""What a person could change in the prompts so that more of them is shared. Knows only texts.

A line near the top that differs from row to row (a timestamp, an id) hides everything below it from
sharing. Each of the first lines is tried at the end instead, on a sample of rows; no text is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.plan.sorting import sort_rows
from pipeline.plan.token_table import TokenTable

SAMPLE_ROWS = 1000
SAMPLE_CHARACTERS = 4000
"""Of each row: what a line near the top hides begins before. Memory is 27 bytes for each."""
_LINES = 12  # tried, from the top
_LEAST_GAIN = 0.05  # of all characters: less is not worth a change


@dataclass(frozen=True)
class Advice:
    """Moving line `line` (from 1) of the prompt to its end would raise the shared share of all
    characters from `shared_now` to `shared_then`; the sample had `rows`."""

    line: int
    rows: int
    shared_now: float
    shared_then: float

    @property
    def cost(self) -> float:
        """Share of the possible reuse that the line costs where it is."""
        return 1.0 - self.shared_now / self.shared_then

    def __str__(self) -> str:
        return (
            f"line {self.line} of the prompts costs {self.cost:.0%} of the possible reuse: "
            f"at the end of the prompt it would let {self.shared_then:.0%} be shared, "
            f"not {self.shared_now:.0%}"
        )

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        return asdict(self) | {"cost": self.cost, "text": str(self)}


def advise(prompts: Sequence[str]) -> Advice | None:
    """The one line whose move would gain most, or None where none gains enough."""
    lines = [prompt.split("\n") for prompt in prompts]
    now = shared_share(prompts)
    tried = range(min(_LINES, max((len(x) - 1 for x in lines), default=0)))
    moved = {line: shared_share([_move_to_end(x, line) for x in lines]) for line in tried}
    if not moved:
        return None
    best = max(moved, key=lambda line: moved[line])
    if moved[best] - now < _LEAST_GAIN:
        return None
    return Advice(best + 1, len(prompts), now, moved[best])


def shared_share(texts: Sequence[str]) -> float:
    """1 - U/T over the characters of `texts`."""
    points = [np.frombuffer(text.encode("utf-32-be", "replace"), ">u4") for text in texts]
    lengths = np.array([len(p) for p in points], np.int64)
    if not lengths.any():
        return 0.0
    table = TokenTable.from_batches([(np.concatenate(points), lengths)], np.dtype(">u4"))
    shared = sort_rows(table, np.zeros(len(table), np.int64)).shared
    return float(shared.sum() / lengths.sum())


def _move_to_end(lines: list[str], line: int) -> str:
    return "\n".join([*lines[:line], *lines[line + 1 :], *lines[line : line + 1]])
