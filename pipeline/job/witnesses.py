"""A few of a job's own conversations, rendered whole: are their turns what they are taken for?

What a turn adds is rendered by itself, see `tokens/turns.py`. Whether the template is as local as
that needs was tried out with made conversations; here it is with messages that rows really have.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile

import numpy as np

from pipeline.inputs.turns import Turns
from pipeline.prompts import PromptBatch, TurnPrompt
from pipeline.tokens.turns import LaterTurns

_CONVERSATIONS = 16
_MOST_TURNS = 50  # of each, from the first on
_MOST_LETTERS = 20_000  # of a turn


class Witnesses:
    """The longest conversation and some others, as far as their turns have been read."""

    def __init__(self, turns: Turns | None) -> None:
        self._rows: list[list[int]] = [] if turns is None else _choose(turns)
        self._wanted = np.sort(np.array([row for rows in self._rows for row in rows], np.int64))
        self._seen: dict[int, TurnPrompt] = {}

    def see(self, batch: PromptBatch) -> None:
        """The next rows, in any order."""
        stop = batch.row_start + len(batch.contents)
        low, high = np.searchsorted(self._wanted, [batch.row_start, stop])
        for row in self._wanted[low:high].tolist():
            content = batch.contents[row - batch.row_start]
            if isinstance(content, TurnPrompt) and _letters(content) <= _MOST_LETTERS:
                self._seen[row] = content

    def check(self, later: LaterTurns | None, rejected: Collection[int]) -> None:
        """Raises UsageError where one of them is written otherwise; `rejected`: rows without a
        prompt, which end what is looked at."""
        for rows in self._rows if later is not None else ():
            known = takewhile(lambda row: row in self._seen and row not in rejected, rows)
            turns = [self._seen[row] for row in known]
            if len(turns) > 1 and later is not None:
                later.check_conversation(turns)


def _choose(turns: Turns) -> list[list[int]]:
    """Rows of the first turns of some conversations."""
    counts = np.diff(turns.bounds)
    if not len(counts):
        return []
    some = np.linspace(0, len(counts) - 1, _CONVERSATIONS).astype(np.int64)
    chosen = np.unique(np.append(some, np.argmax(counts)))
    low, high = turns.bounds[chosen], turns.bounds[chosen + 1]
    ends = np.minimum(high, low + _MOST_TURNS)
    return [turns.order[a:b].tolist() for a, b in zip(low, ends, strict=True)]


def _letters(turn: TurnPrompt) -> int:
    if isinstance(turn.content, str):
        return len(turn.content)
    return sum(len(text) for message in turn.content for text in message.values())
