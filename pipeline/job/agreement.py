"""How well answers over reused documents agree with those of full attention. Pure arithmetic.

Rows are drawn from a job's own, so the bound is one of a share of these rows: whether they resemble
one another changes nothing about it. Where all of them were computed both ways there is nothing to
bound, and the share itself is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.binomial import clopper_pearson_lower
from pipeline.reuse_settings import ReuseSettings


@dataclass(frozen=True, slots=True, eq=False)
class ComparedRow:
    """One row computed both ways.

    `documents`: how many it has; `is_same`: whether its greedy answer is that of full attention.
    Given that answer token by token: `same_choice` bool, where the likeliest token is the same;
    `kl` float64, at some of these positions, how far the distribution is from full attention's,
    nats.
    """

    documents: int
    is_same: bool
    same_choice: NDArray[np.bool_]
    kl: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of `of_rows` rows `rows` were computed both ways, and `same` of these got the same answer.

    `lower_bound`: of all of them at least that share does, with 95 % confidence. `mean_kl` (nats)
    and `same_choice` (a share) are means over positions; None where there is none, or no number.
    """

    rows: int
    same: int
    of_rows: int
    lower_bound: float
    mean_kl: float | None
    same_choice: float | None

    @classmethod
    def of(cls, rows: Sequence[ComparedRow], of_rows: int) -> Agreement:
        same = sum(row.is_same for row in rows)
        is_census = len(rows) == of_rows > 0
        return cls(
            len(rows),
            same,
            of_rows,
            same / of_rows if is_census else clopper_pearson_lower(same, len(rows)),
            _mean(row.kl for row in rows),
            _mean(row.same_choice for row in rows),
        )


def by_documents(
    rows: Sequence[ComparedRow], of_rows: Mapping[int, int]
) -> list[dict[str, int | float | None]]:
    """The agreement of rows by how many documents they have, fewest first, as JSON has it.

    `of_rows`: how many rows of the job have so many.
    """
    found = []
    for documents in sorted({row.documents for row in rows}):
        some = [row for row in rows if row.documents == documents]
        found.append({"documents": documents, **asdict(Agreement.of(some, of_rows[documents]))})
    return found


def objections(found: Agreement, settings: ReuseSettings) -> list[str]:
    """Why documents should not be reused, a clause each; nothing where they may."""
    reasons = []
    if found.lower_bound < settings.min_agreement:
        share = f"{found.lower_bound:.1%} of the answers agree"
        if found.rows < found.of_rows:
            share = f"with 95 % confidence at least {share}"
        reasons.append(f"{share}, and --min-agreement asks for {settings.min_agreement:.1%}")
    if found.mean_kl is None:
        reasons.append("the distributions cannot be compared")
    elif found.mean_kl > settings.max_kl:
        reasons.append(
            f"they differ by {found.mean_kl:.2g} nats, and --max-kl allows {settings.max_kl:g}"
        )
    return reasons


def describe_calibration(found: Mapping[str, Any]) -> str:
    """What was measured and decided, from the `calibration` of run.json, for a person."""
    decision, cost = found["decision"], found["cost"]
    if decision == "skipped":
        why = "no row has one" if found["asked_rows"] else "--calibration-rows 0"
        return f"documents are reused, and nobody measured what that changes ({why})"
    tokens = cost["prefilled_tokens"] + cost["generated_tokens"]
    measured = f"{_describe_rows(found['agreement'])} ({tokens:,} tokens, {cost['seconds']:.1f} s)"
    what = "; ".join(found["reasons"]) or _describe_distance(found["agreement"])
    end = {
        "reuse": "documents are reused",
        "warn": "documents are reused all the same",
        "fallback": "so whole prompts are computed, as by --reuse prefix",
        "abort": "so no row is answered",
    }[decision]
    return f"{measured}; {what}; {end}"


def _describe_rows(found: Mapping[str, Any]) -> str:
    drawn = "all " if found["rows"] == found["of_rows"] else ""
    return f"{found['same']:,} of {drawn}{found['rows']:,} rows get the answer of full attention"


def _describe_distance(found: Mapping[str, Any]) -> str:
    said, kl, choice = [], found["mean_kl"], found["same_choice"]
    if found["rows"] < found["of_rows"]:
        bound, rows = f"{found['lower_bound']:.1%}", f"{found['of_rows']:,}"
        said.append(f"of all {rows} at least {bound}, with 95 % confidence")
    if kl is not None and choice is not None:
        said.append(f"mean KL {kl:.2g} nats, the same likeliest token at {choice:.1%}")
    return "; ".join(said)


def _mean(parts: Iterable[NDArray[np.generic]]) -> float | None:
    every = np.concatenate([np.zeros(0), *parts])
    mean = float(every.mean()) if len(every) else float("nan")
    return mean if np.isfinite(mean) else None
