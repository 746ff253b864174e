"""The most KV that neighbouring sequences of a plan need at once. Knows no bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.document_order import run_order
from pipeline.plan.documents import DocumentPlan
from pipeline.plan.plan import Plan


class KVNeeds(NamedTuple):
    """Sequences in the order in which they run: `own` tokens of each, and spans that several need,
    from one of them on (`low`) until before another (`high`)."""

    own: NDArray[np.int64]
    span: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]

    @classmethod
    def of(cls, plan: Plan) -> KVNeeds:
        if plan.documents is not None:
            return _of_documents(plan, plan.documents)
        return _of_prefixes(plan)

    def peak(self, max_rows: int) -> int:
        """The most KV tokens alive at once when at most `max_rows` neighbours run together.

        A window `[w, w + R)` of sequences holds their own tokens and every span that is needed by
        any of them, or before and behind them: those with `low < w + R` and `high > w`.
        """
        num = len(self.own)
        if not num:
            return 0
        width = min(max_rows, num)
        upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.own)])
        in_window = upto[width:] - upto[:-width]
        change = np.zeros(num + 1, np.int64)
        np.add.at(change, np.maximum(self.low - width + 1, 0), self.span)
        np.add.at(change, self.high, -self.span)
        return int((in_window + np.cumsum(change)[: len(in_window)]).max())


def _of_prefixes(plan: Plan) -> KVNeeds:
    """Spans are group nodes, needed by all sequences below them."""
    group = plan.group_of_row[plan.sequences.row]
    covered = np.where(group >= 0, plan.tree.end[group], 0)
    nodes = np.flatnonzero(plan.is_group)
    return KVNeeds(
        np.maximum(plan.most_tokens + 1 - covered, 0),
        plan.tree.end[nodes] - plan.anchor_end[nodes],
        plan.sequence_lo[nodes],
        plan.sequence_hi[nodes],
    )


def _of_documents(plan: Plan, documents: DocumentPlan) -> KVNeeds:
    """Spans are nodes of the documents' tree, from the first that needs one to the last."""
    order = run_order(documents, np.arange(len(plan.sequences)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    users, bounds = documents.users(np.arange(len(order)))
    nodes = np.flatnonzero(np.diff(bounds))
    starts, at = bounds[nodes], place[users]
    own = documents.kept_tokens + plan.max_new_tokens
    low, high = (f.reduceat(at, starts) if len(nodes) else at for f in (np.minimum, np.maximum))
    return KVNeeds(own[order], documents.tree.edge_lengths[nodes], low, high + 1)
