"""What reusing documents at any position is worth, in numbers. Knows no settings and no text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.plan.plan import Plan
from pipeline.plan.segment_table import Segments, number_segments

_ENOUGH = 0.9  # of the saving at any position


@dataclass(frozen=True)
class DocumentFigures:
    """`distinct` documents of so many `uses`; `tokens` and `kv_bytes` (None: no model) where each
    is kept once.

    Tokens to compute: `by_this_mode`; by prefixes alone, `in_given_order` of the documents and
    `in_best_order`; `at_any_position`, if each document is encoded once and taken as it is. None:
    nobody asked, or it takes too much memory.
    """

    mode: str
    rows: int
    distinct: int
    uses: int
    tokens: int
    kv_bytes: int | None
    prompt_tokens: int
    by_this_mode: int
    in_given_order: int | None = None
    in_best_order: int | None = None
    at_any_position: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values, with a sentence for a person, or None."""
        return asdict(self) | {"text": self._text()}

    def _text(self) -> str | None:
        """Which way to choose, where they were counted."""
        if self.in_given_order is None or self.at_any_position is None or not self.prompt_tokens:
            return None
        given, anywhere = self._saved(self.in_given_order), self._saved(self.at_any_position)
        best = given if self.in_best_order is None else self._saved(self.in_best_order)
        if anywhere <= given:
            return "no document is used again behind another one, so --reuse prefix saves as much"
        if given >= _ENOUGH * anywhere:
            return (
                f"--reuse prefix is enough: it saves {given:.1%}, exactly, and reuse at any "
                f"position {anywhere:.1%}"
            )
        if best >= _ENOUGH * anywhere:
            return (
                f"the best order is enough: --document-order best saves {best:.1%} with exact "
                f"reuse, and reuse at any position {anywhere:.1%}"
            )
        ordered = "" if self.in_best_order is None else f" and, in the best order, {best:.1%}"
        return (
            f"reuse at any position saves {anywhere:.1%}, prefixes {given:.1%}{ordered}; all but "
            "prefixes are approximate: --reuse epic"
        )

    def _saved(self, tokens: int) -> float:
        return 1 - tokens / self.prompt_tokens


def count_figures(
    plan: Plan, segments: Segments, mode: str, bytes_per_token: int | None
) -> DocumentFigures:
    """Of the documents of a plan's sequences, as it was made."""
    is_document = segments.are_documents(plan.sequences.row)
    number = number_segments(plan.table, segments, is_document).number
    uses, first = np.unique(number[is_document], return_index=True)
    tokens = int(segments.lengths[is_document][first].sum())
    runs = plan.sequence_of_row >= 0
    return DocumentFigures(
        mode=mode,
        rows=int(runs.sum()),
        distinct=len(uses),
        uses=int(is_document.sum()),
        tokens=tokens,
        kv_bytes=None if bytes_per_token is None else tokens * bytes_per_token,
        prompt_tokens=int(plan.table.lengths[runs].sum()),
        by_this_mode=plan.tokens_to_compute(np.arange(len(plan.sequences))),
    )
