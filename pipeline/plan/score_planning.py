"""A plan whose table rows are requests, and what of its logits is read; and that in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from pipeline.plan.plan import Plan
from pipeline.plan.requests import Requests
from pipeline.plan.scores import plan_scores


def with_scores(plan: Plan, requests: Requests) -> Plan:
    """The same plan, whose sequences are read and not continued."""
    scores = plan_scores(
        plan.tree,
        plan.sequences.prompt,
        plan.sequence_of_row,
        requests.contexts,
        requests.continuations(plan.table),
    )
    return replace(plan, scores=scores)


@dataclass(frozen=True)
class ScoreFigures:
    """`requests` that run: so many different `contexts`, and `continuations` behind these; tokens
    that they score; `scored_positions`: where the model's head is computed, each once.
    `resent_tokens`: what a backend computes that sends every request by itself;
    `resent_once_tokens`: each prompt that is another one. `rows_cut`: whose contexts gave up their
    beginnings."""

    requests: int
    contexts: int
    continuations: int
    scored_tokens: int
    scored_positions: int
    resent_tokens: int
    resent_once_tokens: int
    rows_cut: int

    @classmethod
    def of(cls, plan: Plan, requests: Requests) -> ScoreFigures:
        """Of a plan with scores."""
        assert plan.scores is not None
        lengths, runs = plan.table.lengths, plan.sequence_of_row >= 0
        return cls(
            requests=int(runs.sum()),
            contexts=plan.scores.num_contexts,
            continuations=plan.scores.num_continuations,
            scored_tokens=int(requests.token_counts(lengths)[runs].sum()),
            scored_positions=plan.scores.num_points,
            resent_tokens=int(lengths[runs].sum()),
            resent_once_tokens=int(lengths[plan.tree.row_of_prompt].sum()),
            rows_cut=int((requests.cut > 0).sum()),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def by_rows(frame: pl.DataFrame, requests: Requests) -> pl.DataFrame:
    """`plan_frame` of requests as one of input rows, in the order of their first requests that run:
    sequence, group and depth are those of that one, `prompt_tokens` those of all."""
    row = pl.Series(requests.row).gather(frame["row_index"])
    first = pl.all().exclude("row_index", "prompt_tokens", "max_new_tokens", "dedup_of").first()
    return (
        frame.with_columns(row_index=row)
        .group_by("row_index", maintain_order=True)
        .agg(
            first,
            pl.col("prompt_tokens").sum(),
            pl.len().cast(pl.Int64).alias("requests"),
        )
        .select(
            *("row_index", "id", "sequence", "prompt", "group_id", "reuse_depth", "prompt_tokens"),
            pl.lit(0, pl.Int64).alias("max_new_tokens"),
            pl.lit(None, pl.String).alias("dedup_of"),
            "requests",
        )
    )
