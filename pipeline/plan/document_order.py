"""Which order lets documents be reused most: of the documents in a row, and of the rows.

Of the documents in a row, for prefixes: rows share a document only where all before it agree, so
the one that saves most, (uses - 1) x tokens, comes first in all rows that have it. These rows and
the others are then on their own, and the same is done with what is left of each.

Of the rows, for a device: see `row_order.py`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.documents import DocumentPlan


def run_order(documents: DocumentPlan, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """`sequences` (ascending) in the order in which a device should run them."""
    is_wanted = np.zeros(len(documents.order), bool)
    is_wanted[sequences] = True
    return documents.order[is_wanted[documents.order]]


def best_order(
    documents: Sequence[Sequence[int]], tokens: Sequence[int], group: Sequence[int]
) -> list[list[int]]:
    """The documents of each row, by number, in the order in which rows share most of them.

    `tokens`: of each document; rows of two groups share nothing. Those that save nothing stay in
    the order in which they were given, behind the others.
    """
    left = [dict(Counter(row)) for row in documents]
    order: list[list[int]] = [[] for _ in documents]
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(group):
        groups.setdefault(number, []).append(row)
    ahead = [rows for rows in groups.values() if len(rows) > 1]
    while ahead:
        ahead += _split(ahead.pop(), left, order, tokens)
    for row, given in enumerate(documents):
        taken = Counter(order[row])
        for document in given:
            if taken[document]:
                taken[document] -= 1
            else:
                order[row].append(document)
    return order


def _split(
    rows: list[int], left: list[dict[int, int]], order: list[list[int]], tokens: Sequence[int]
) -> list[list[int]]:
    """Let rows that agree so far take the documents that save most; the sets of rows, each with a
    document of its own, in which they agree after that. `left`: of each row, documents that it has
    not taken, and how often."""
    having: dict[int, list[int]] = {}
    for row in rows:
        for document in left[row]:
            having.setdefault(document, []).append(row)
    uses = {document: len(users) for document, users in having.items() if len(users) > 1}
    heap = [((1 - n) * tokens[document], document) for document, n in uses.items()]
    heapq.heapify(heap)
    taken, parts = set[int](), []
    while heap:
        saved, document = heapq.heappop(heap)
        now = (1 - uses[document]) * tokens[document]
        if now > saved:  # some of its rows have taken another one
            if now < 0:
                heapq.heappush(heap, (now, document))
            continue
        users = [row for row in having[document] if row not in taken]
        for row in users:
            order[row].append(document)
            left[row][document] -= 1
            if not left[row][document]:
                del left[row][document]
        if len(users) == len(rows) - len(taken):  # all that are left agree as before
            again = [row for row in users if document in left[row]]
            if len(again) > 1:
                uses[document], having[document] = len(again), again
                heapq.heappush(heap, ((1 - len(again)) * tokens[document], document))
            continue
        parts.append(users)
        taken.update(users)
        for row in users:
            for other in left[row]:
                if other in uses:
                    uses[other] -= 1
    return parts
