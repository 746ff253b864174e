"""Rows in bins: by planned reuse depth, and by the size of their prefix groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl

_DEPTH_EDGES: Final = (1, 16, 64, 256, 1024, 4096, 16384)
_SIZE_EDGES: Final = (2, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class DepthBin:
    """Answered rows whose planned reuse depth (tokens) lies in the interval that `label` names.

    `service_*_s`: latency without the wait in the queue, at the 10th, 50th and 90th percentile.
    """

    label: str
    rows: int
    computed_tokens: int
    cached_tokens: int
    service_p10_s: float
    service_p50_s: float
    service_p90_s: float


@dataclass(frozen=True)
class SizeBin:
    """Rows that live in prefix groups of so many rows."""

    label: str
    rows: int


def measure_depths(output: pl.LazyFrame) -> tuple[DepthBin, ...]:
    """Tokens and times of answered rows by reuse depth; rows copied from another are left out."""
    ran = output.filter(pl.col("status") == "ok", pl.col("dedup_of").is_null())
    service = pl.col("latency_s") - pl.col("queue_s")
    bins = (
        ran.group_by(bin=_bin("reuse_depth", _DEPTH_EDGES))
        .agg(
            pl.len(),
            (pl.col("prompt_tokens") - pl.col("cached_tokens")).sum().alias("computed"),
            pl.col("cached_tokens").sum(),
            *(service.quantile(q, "linear").alias(f"q{q}") for q in (0.1, 0.5, 0.9)),
        )
        .sort("bin")
        .collect()
    )
    labels = _labels(0, _DEPTH_EDGES)
    return tuple(DepthBin(labels[row[0]], *row[1:]) for row in bins.iter_rows())


def measure_group_sizes(output: pl.LazyFrame) -> tuple[SizeBin, ...]:
    """Rows by the number of rows of their group; a row without a group is a group of one.

    The bins are consecutive: one without rows is there too if a larger one has some.
    """
    sizes = output.filter(pl.col("status") == "ok").group_by("group_id").agg(pl.len())
    alone = pl.col("group_id").is_null()
    size = sizes.with_columns(size=pl.when(alone).then(1).otherwise("len"))
    bins = size.group_by(bin=_bin("size", _SIZE_EDGES)).agg(pl.col("len").sum()).collect()
    rows = dict(bins.iter_rows())
    labels = _labels(1, _SIZE_EDGES)[: max(rows, default=-1) + 1]
    return tuple(SizeBin(label, rows.get(index, 0)) for index, label in enumerate(labels))


def _bin(column: str, edges: Sequence[int]) -> pl.Expr:
    """How many of the edges the value has reached."""
    return pl.sum_horizontal(pl.col(column) >= edge for edge in edges).cast(pl.Int64)


def _labels(lowest: int, edges: Sequence[int]) -> list[str]:
    """`0`, `1–15`, ..., `256–1k`, `1k–4k`, ..., `16k+`; a rounded upper end is left out."""
    starts = [lowest, *edges]
    spans = [
        _short(low) if last == low else f"{_short(low)}–{_short(last)}"
        for low, last in zip(starts, (e - (e < 1024) for e in edges), strict=False)
    ]
    return [*spans, f"{_short(edges[-1])}+"]


def _short(number: int) -> str:
    return f"{number >> 10}k" if number >= 1024 else str(number)
