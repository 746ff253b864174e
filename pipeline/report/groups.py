"""What each prefix group cost and gave, from the rows of a run. Draws nothing, reads no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import polars as pl

_LISTED: Final = 200
_SUMS: Final = ("rows", "saved_tokens", "failed", "audited", "differing")


@dataclass(frozen=True)
class Group:
    """One prefix group. What was not measured is None; `audited` is, where nobody has audited.

    `latency_p50_s`: median of answered rows that ran themselves, without the wait in the queue.
    """

    group_id: int
    rows: int
    prefix_tokens: int | None
    saved_tokens: int
    latency_p50_s: float | None
    failed: int
    audited: int | None
    differing: int | None


@dataclass(frozen=True)
class Others:
    """Rows that are not listed by group, summed: of `groups` smaller groups, or of none at all."""

    groups: int
    rows: int
    saved_tokens: int
    failed: int
    audited: int | None
    differing: int | None


@dataclass(frozen=True)
class GroupTable:
    """The largest groups, by rows; every other row of the run is in one of the two sums."""

    largest: tuple[Group, ...] = ()
    smaller: Others | None = None
    ungrouped: Others | None = None


def measure_groups(
    output: pl.LazyFrame, tree: pl.DataFrame | None, audited: pl.DataFrame | None
) -> GroupTable:
    """`output` is scanned, never loaded whole; `tree`: `node` and `end` of the plan's nodes.

    Where there are tenants, rows name groups by numbers of their own, not by nodes: then the length
    of the prefix is not known here.
    """
    groups = _with_prefix(_by_group(output), tree)
    groups = _with_audit(groups, audited)
    named = groups.filter(pl.col("group_id").is_not_null()).sort(
        "rows", "saved_tokens", "group_id", descending=[True, True, False]
    )
    return GroupTable(
        tuple(Group(**row) for row in named.head(_LISTED).iter_rows(named=True)),
        _sum(named.slice(_LISTED)),
        _sum(groups.filter(pl.col("group_id").is_null())),
    )


def _by_group(output: pl.LazyFrame) -> pl.DataFrame:
    is_ok = pl.col("status") == "ok"
    service = pl.col("latency_s") - pl.col("queue_s")
    return (
        output.group_by("group_id")
        .agg(
            rows=pl.len().cast(pl.Int64),
            saved_tokens=pl.col("cached_tokens").filter(is_ok).cast(pl.Int64).sum(),
            latency_p50_s=service.filter(is_ok & pl.col("dedup_of").is_null()).median(),
            failed=(~is_ok).cast(pl.Int64).sum(),
        )
        .collect()
    )


def _with_prefix(groups: pl.DataFrame, tree: pl.DataFrame | None) -> pl.DataFrame:
    if tree is None:
        return groups.with_columns(prefix_tokens=pl.lit(None, pl.Int64))
    ends = tree.select(group_id="node", prefix_tokens="end")
    return groups.join(ends, on="group_id", how="left")


def _with_audit(groups: pl.DataFrame, audited: pl.DataFrame | None) -> pl.DataFrame:
    if audited is None:
        return groups.with_columns(pl.lit(None, pl.Int64).alias(name) for name in _SUMS[-2:])
    found = audited.group_by("group_id").agg(
        audited=pl.len().cast(pl.Int64), differing=(~pl.col("audit_exact")).cast(pl.Int64).sum()
    )
    return groups.join(found, on="group_id", how="left", nulls_equal=True).with_columns(
        pl.col("audited", "differing").fill_null(0)
    )


def _sum(groups: pl.DataFrame) -> Others | None:
    if groups.is_empty():
        return None
    sums: dict[str, Any] = {name: groups[name].sum() for name in _SUMS}
    if groups["audited"].null_count():
        sums |= {"audited": None, "differing": None}
    return Others(groups=groups.height, **sums)
