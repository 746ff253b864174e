"""The order in which a device runs rows that share documents. Knows numbers of documents only.

Documents rarely fit all at once, and one that had to give way is encoded again. So next comes a row
whose documents are there already: of the rows that share one with the row before, some for each,
the one with most tokens among the documents that were used last; or of those that share one with
rows a little before. Where there is none, the row with the rarest documents comes next: few rows
can follow it, and they all do at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TRIED = 8  # rows of each document; more are no better
_TRIED_AGAIN = 64  # documents that were used before those of the last row
_REMEMBERED = 256  # documents, as if so many had room
_COMPARED = 8  # documents of a row that decide where it begins


def order_rows(
    bounds: NDArray[np.int64], used: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """All rows, each once. Row i has the documents `used[bounds[i] : bounds[i + 1]]`, each of
    `tokens[document]` tokens."""
    starts, flat = bounds.tolist(), used.tolist()
    rows = [flat[low:high] for low, high in zip(starts[:-1], starts[1:], strict=True)]
    base = _rarest_first(bounds, used, len(tokens)).tolist()
    return _Follower(rows, tokens.tolist(), base).order()


def _rarest_first(
    bounds: NDArray[np.int64], used: NDArray[np.int64], num_documents: int
) -> NDArray[np.int64]:
    """Rows by their rarest document that another row has as well, then by the next."""
    row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    uses = np.bincount(used, minlength=num_documents)
    is_shared = uses[used] > 1
    row, document = row[is_shared], used[is_shared]
    rank = np.empty(num_documents, np.int64)
    rank[np.lexsort((np.arange(num_documents), uses))] = np.arange(num_documents)
    in_order = np.lexsort((rank[document], row))
    row, ranks = row[in_order], rank[document[in_order]]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    is_compared = place < _COMPARED
    keys = np.full((_COMPARED, len(bounds) - 1), num_documents)
    keys[place[is_compared], row[is_compared]] = ranks[is_compared]
    order: NDArray[np.int64] = np.lexsort(keys[::-1])
    return order


class _Follower:
    """Goes from row to row as the module says. `base`: the order of those that follow no other."""

    def __init__(self, rows: Sequence[list[int]], tokens: Sequence[int], base: list[int]) -> None:
        self._rows = rows
        self._tokens = tokens
        self._base = base
        self._whole = [sum(map(tokens.__getitem__, documents)) for documents in rows]
        self._done = bytearray(len(rows))
        self._recent: dict[int, None] = {}
        self._waiting: dict[int, list[int]] = {}
        for row in reversed(base):  # those that come first lie at the end
            for document in rows[row]:
                self._waiting.setdefault(document, []).append(row)

    def order(self) -> NDArray[np.int64]:
        order: list[int] = []
        ahead, current = iter(self._base), list[int]()
        while len(order) < len(self._rows):
            following = self._best_after(current)
            if following < 0:
                following = self._best_after([*self._recent][: -_TRIED_AGAIN - 1 : -1])
            if following < 0:
                following = next(row for row in ahead if not self._done[row])
            self._done[following] = True
            order.append(following)
            current = self._rows[following]
            self._remember(current)
        return np.array(order, np.int64)

    def _remember(self, documents: list[int]) -> None:
        recent = self._recent
        for document in documents:
            recent.pop(document, None)
            recent[document] = None
        while len(recent) > _REMEMBERED:
            del recent[next(iter(recent))]

    def _best_after(self, current: list[int]) -> int:
        """Of rows that have one of these documents; -1: there is none."""
        rows, tokens, done, recent = self._rows, self._tokens, self._done, self._recent
        best, most = -1, -1
        for document in current:
            some = self._waiting[document]
            while some and done[some[-1]]:
                some.pop()
            for row in some[: -_TRIED - 1 : -1]:
                if done[row]:
                    continue
                there = 0
                for other in rows[row]:
                    if other in recent:
                        there += tokens[other]
                if there > most:
                    best, most = row, there
                    if there == self._whole[row]:  # no row has more to find
                        return best
        return best
