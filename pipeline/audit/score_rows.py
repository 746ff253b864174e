"""One audited row of scores: does plain full prefill find them as likely? Knows no files.

How a row is classed by its worst continuation, of n tokens and off by d nats:

```
            identical / near_tie          drift                      corrupt
 d / √n   | ... the tier's bar ]  ... hard bar ]        beyond, or NaN, or another count
```

Errors of rounding in n tokens add up as √n. Within the bar a row is identical where the baseline
makes the same choice, and finds the same continuations greedy; it is a near-tie where the baseline
itself could not tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.audit.replay import Bars, RowAudit, RowClass, Tier
from pipeline.engine.base import Likelihood
from pipeline.job.row_scores import RowScores, compare

Request = tuple[Sequence[int], Sequence[int]]
"""A context and a continuation."""


SCORE_BARS: Final[dict[Tier, Bars]] = {
    "strict": Bars(near_tie=1e-3),
    "exact": Bars(near_tie=1e-3),
    "16-bit": Bars(near_tie=1.0, hard=2.5),
    "int8": Bars(near_tie=1.0, hard=2.5),
}
"""In 16 bits logits are a quarter of a nat apart where they are large: plain full prefill itself is
half a nat from what it says in float32, measured, and more where a token is very unlikely."""


class Part(NamedTuple):
    """Continuations `[low, high)` of a row, one of which was chosen: its choices, or the labels of
    the question `name`. `chosen`: its place among them; -1: what was written of them does not
    follow from the row's own numbers."""

    name: str
    low: int
    high: int
    chosen: int


@dataclass(frozen=True)
class ScoredInput:
    """A written row: `requests` as they are made anew from the input, and what was written.
    `is_one`: they are windows of one prompt, of which one sum was written; `asked`: questions."""

    row_index: int
    requests: Sequence[Request]
    loglikelihoods: Sequence[float]
    greedy: Sequence[bool]
    token_counts: Sequence[int]
    choice_index: int | None
    normalize: str = "none"
    num_bytes: Sequence[int] = ()
    is_one: bool = False
    asked: Sequence[Part] = ()

    @cached_property
    def parts(self) -> Sequence[Part]:
        """All that was chosen."""
        if self.choice_index is None:
            return self.asked
        return (Part("", 0, len(self.loglikelihoods), self.choice_index),)

    def scores(self, part: Part, values: Sequence[float]) -> RowScores:
        """Of a part of the row, with `values` for all its continuations."""
        some = slice(part.low, part.high)
        return RowScores(
            list(values[some]),
            [],
            list(self.token_counts[some]),
            list(self.num_bytes[some]),
            [ids[-1] for _, ids in self.requests[some]],
        )


class ScoreAudit(NamedTuple):
    """`deltas`: of each continuation that was written, nats; `same_choice`: None where there is
    nothing to choose from; `parts`: of each what was found, (whether it is the same, deltas)."""

    audit: RowAudit
    deltas: tuple[float, ...]
    same_choice: bool | None
    parts: tuple[tuple[str, bool, tuple[float, ...]], ...] = ()


def joined(row: ScoredInput, found: Sequence[Likelihood]) -> list[Likelihood]:
    """Of each continuation that was written, what the baseline says of the row's requests."""
    if not row.is_one:
        return list(found)
    sums, tokens, deficits, margins = zip(*found, strict=True)
    return [Likelihood(math.fsum(sums), sum(tokens), max(deficits), min(margins))]


def audit_scores(row: ScoredInput, expected: Sequence[Likelihood], bars: Bars) -> ScoreAudit:
    """Class a row by what the baseline says."""
    values = list(row.loglikelihoods)
    counts = [reference.tokens for reference in expected]
    is_whole = counts == list(row.token_counts) and len(values) == len(expected)
    if not is_whole or len(row.greedy) != len(expected):
        return _result(row, "corrupt", 0, None, None, (), None)
    deltas = tuple(_distance(a, b.loglikelihood) for a, b in zip(values, expected, strict=True))
    errors = [delta / math.sqrt(n) for delta, n in zip(deltas, counts, strict=True)]
    worst = max(range(len(errors)), key=lambda i: -math.inf if errors[i] <= 0 else errors[i])
    deficit = math.nan if any(map(math.isnan, errors)) else errors[worst]
    found = [(part, *_same_choice(row, expected, part)) for part in row.parts]
    same_choice = all(same for _, same, _ in found) if found else None
    margin = max((by for _, _, by in found), default=None)
    greedy_by = max(map(_greedy_distance, row.greedy, expected), default=0.0)
    row_class = _classify(deficit, bars)
    if row_class == "identical" and (same_choice is False or greedy_by > 0):
        unexplained = max(margin or 0.0, greedy_by)
        row_class = "near_tie" if unexplained <= _tie(bars) else "corrupt"
    divergence = None if row_class == "identical" else worst
    result = _result(row, row_class, divergence, margin, deficit, deltas, same_choice)
    parts = tuple((part.name, same, deltas[part.low : part.high]) for part, same, _ in found)
    return result._replace(parts=parts)


def _tie(bars: Bars) -> float:
    """By how much two things may differ that the baseline cannot tell apart: each is off."""
    return 2 * bars.near_tie


def _distance(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b)  # of two probabilities of 0 as well


def _classify(error: float, bars: Bars) -> RowClass:
    if error <= bars.near_tie:
        return "identical"
    return "drift" if error <= bars.hard else "corrupt"  # NaN compares false: corrupt


def _same_choice(
    row: ScoredInput, expected: Sequence[Likelihood], part: Part
) -> tuple[bool, float]:
    """Whether the baseline chooses as the row does; by how much, in nats as they are compared, it
    finds the row's choice less likely than its own. What was written must follow from the row's own
    numbers."""
    theirs = row.scores(part, [reference.loglikelihood for reference in expected])
    chosen = compare(row.scores(part, row.loglikelihoods), row.normalize)
    best = compare(theirs, row.normalize)
    if chosen is None or best is None or chosen.best != part.chosen:
        return False, math.inf
    return chosen.best == best.best, math.log(
        best.probabilities[best.best] / max(best.probabilities[chosen.best], 1e-300)
    )


def _greedy_distance(said: bool, expected: Likelihood) -> float:
    """0 where greedy decoding would say so; else how far the baseline is from that."""
    if said == (expected.deficit <= 0):
        return 0.0
    return expected.deficit if said else expected.margin


def _result(
    row: ScoredInput,
    row_class: RowClass,
    divergence: int | None,
    margin: float | None,
    deficit: float | None,
    deltas: tuple[float, ...],
    same_choice: bool | None,
) -> ScoreAudit:
    audit = RowAudit(
        row_index=row.row_index,
        row_class=row_class,
        first_divergence=divergence,
        margin=margin,
        deficit=deficit,
        tokens_checked=sum(len(ids) for _, ids in row.requests),
        baseline_ids=(),
        edit_similarity=float(row_class == "identical"),
    )
    return ScoreAudit(audit, deltas, same_choice)


def describe_scores(audits: Sequence[ScoreAudit]) -> Mapping[str, Any]:
    """How far the audited scores are from the baseline's, over all continuations."""
    deltas = np.array([delta for found in audits for delta in found.deltas])
    choices = [found.same_choice for found in audits if found.same_choice is not None]
    return {
        "continuations": len(deltas),
        "delta_max": float(deltas.max()) if len(deltas) else None,
        "delta_mean": float(deltas.mean()) if len(deltas) else None,
        "rows_with_a_choice": len(choices),
        "same_choice": sum(choices),
        **_describe_questions(audits),
    }


def _describe_questions(audits: Sequence[ScoreAudit]) -> dict[str, Any]:
    """By question; nothing where none were asked."""
    found: dict[str, list[tuple[bool, tuple[float, ...]]]] = {}
    for audit in audits:
        for name, same, deltas in audit.parts:
            if name:
                found.setdefault(name, []).append((same, deltas))
    by_name = {}
    for name, rows in found.items():
        values = np.array([delta for _, deltas in rows for delta in deltas])
        by_name[name] = {
            "rows": len(rows),
            "same_answer": sum(same for same, _ in rows),
            "delta_max": float(values.max()),
            "delta_mean": float(values.mean()),
        }
    return {"questions": by_name} if by_name else {}
