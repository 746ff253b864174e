"""How conversations fared, from the rows of a run. Draws nothing, reads no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from pipeline.storage.schema import CONVERSATION_FIELDS

NEAR_WINDOW: Final = 0.9
"""Of the model's window; beyond it, what a model says is no longer what it has learnt to say."""
_WINDOW_EDGES: Final = (0.25, 0.5, 0.75, NEAR_WINDOW, 1.0)
_WINDOW_LABELS: Final = ("0–25 %", "25–50 %", "50–75 %", "75–90 %", "90–100 %", "over 100 %")
_TURN_EDGES: Final = (2, 3, 4, 5, 9, 17, 33)
_TURN_LABELS: Final = ("1", "2", "3", "4", "5–8", "9–16", "17–32", "33+")
_FULL: Final = ("ContextExceeded", "TurnTooLong", "HistoryFull")
_NAMES: Final = {field.name for field in CONVERSATION_FIELDS}


@dataclass(frozen=True)
class TurnBin:
    """Answered turns that are the so-and-so-manieth of their conversations."""

    label: str
    turns: int
    degenerate: int

    @property
    def share(self) -> float:
        """That repeats itself, or the answer before."""
        return self.degenerate / self.turns


@dataclass(frozen=True)
class ConversationHealth:
    """Of answered turns, the worst where nothing else is said; None: nobody measured it.

    `asked`: turns that have an answer or an error.
    `near_window`: turns that reached beyond 0.9 of the window; `evicting`: turns that gave up
    tokens, `evictions` times in all; `skewed`: turns of which a key stood where it must not;
    `full`, `followed`: turns that failed since the window was full, and since one before failed.
    `by_window`: (label, turns). `max_degenerate`: the most that the job allows.
    """

    asked: int
    conversations: int
    turns: int
    longest: int
    history_tokens: int
    near_window: int
    skewed: int
    degenerate: int
    evicting: int
    evictions: int
    evicted_tokens: int
    span: int | None
    ctx_frac: float | None
    runs: int | None
    gap_ratio: float | None
    mass_kept: float | None
    key_turns: int | None
    prefill_peak: int | None
    prompt_tokens: int
    computed_tokens: int
    full: int
    followed: int
    by_window: tuple[tuple[str, int], ...]
    by_turn: tuple[TurnBin, ...]
    max_degenerate: float | None = None

    @property
    def degenerate_share(self) -> float | None:
        return self.degenerate / self.turns if self.turns else None

    @property
    def resent_ratio(self) -> float | None:
        """How many times as many prompt tokens engines compute that send histories again."""
        return self.prompt_tokens / self.computed_tokens if self.computed_tokens else None

    @property
    def alarms(self) -> list[str]:
        """What a person should look at, in sentences, the worst first."""
        share = self.degenerate_share
        allowed = self.max_degenerate
        too_many = allowed is not None and share is not None and share > allowed
        said = [
            (self.skewed, "turns have keys that stand in a query's future or twice: a fault of "
             "coppice, do not use these answers"),
            (self.degenerate, "turns repeat themselves or the answer before"
             + (f", more than the {allowed:.2%} that --max-degenerate allows" if too_many else "")),
            (self.near_window, "turns reach beyond 90 % of the model's window"),
            (self.full, "turns found no room for their history"),
            (self.followed, "turns were not tried, since one before them failed"),
            (self.evicting, "turns gave up some of their history"),
        ]  # fmt: skip
        return [f"{count:,} of {self.asked:,} {what}" for count, what in said if count]


def measure_conversations(
    output: pl.LazyFrame, settings: dict[str, Any]
) -> ConversationHealth | None:
    """None where rows are prompts by themselves. `output` is scanned, never loaded whole;
    `settings`: those of the run."""
    names = output.collect_schema().names()
    if not names or not set(names) >= _NAMES:
        return None
    whose = ["conversation_id", *(["tenant"] if "tenant" in names else [])]
    turns = output.with_columns(
        place=pl.col("turn").rank("ordinal").over(whose), size=pl.len().over(whose)
    )
    answered = turns.filter(pl.col("status") == "ok")
    total = pl.col("prompt_tokens").cast(pl.Int64).sum()
    found = answered.select(
        conversations=pl.struct(whose).n_unique(),
        turns=pl.len(),
        longest=pl.col("place").max().fill_null(0).cast(pl.Int64),
        history_tokens=pl.col("history_tokens").max().fill_null(0),
        near_window=(pl.col("ctx_frac") > NEAR_WINDOW).sum(),
        skewed=((pl.col("skew") > 0) | (pl.col("duplicate_positions") > 0)).sum(),
        degenerate=pl.col("degenerate").sum(),
        evicting=(pl.col("evictions") > 0).sum(),
        evictions=pl.col("evictions").cast(pl.Int64).sum(),
        span=pl.col("span").max(),
        ctx_frac=pl.col("ctx_frac").max(),
        runs=pl.col("runs").max(),
        gap_ratio=pl.col("gap_ratio").max(),
        mass_kept=pl.col("mass_kept").min(),
        key_turns=pl.col("key_turns").max(),
        prefill_peak=pl.col("prefill_peak").max(),
        prompt_tokens=total,
        computed_tokens=total - pl.col("cached_tokens").cast(pl.Int64).sum(),
    )
    given_up = answered.group_by(whose).agg(pl.col("evicted_tokens").max())  # so far, by turn
    return ConversationHealth(
        **found.collect().row(0, named=True),
        asked=int(turns.select(pl.len()).collect().item()),
        evicted_tokens=int(given_up.select(pl.col("evicted_tokens").sum()).collect().item()),
        full=_count_errors(turns, _FULL),
        followed=_count_errors(turns, ("PriorTurnFailed",)),
        by_window=_by_window(answered),
        by_turn=_by_turn(answered),
        max_degenerate=settings.get("conversations", {}).get("max_degenerate"),
    )


def _count_errors(turns: pl.LazyFrame, kinds: Sequence[str]) -> int:
    return int(turns.select(pl.col("error_type").is_in(kinds).sum()).collect().item())


def _by_window(answered: pl.LazyFrame) -> tuple[tuple[str, int], ...]:
    """Turns by the share of the window that they reached; none where nobody measured it."""
    known = answered.filter(pl.col("ctx_frac").is_not_null())
    reached = pl.sum_horizontal(pl.col("ctx_frac") > edge for edge in _WINDOW_EDGES)
    counts = dict(known.group_by(bin=reached.cast(pl.Int64)).agg(pl.len()).collect().iter_rows())
    last = max(counts, default=-1)
    return tuple((_WINDOW_LABELS[b], counts.get(b, 0)) for b in range(last + 1))


def _by_turn(answered: pl.LazyFrame) -> tuple[TurnBin, ...]:
    reached = pl.sum_horizontal(pl.col("place") >= edge for edge in _TURN_EDGES)
    bins = (
        answered.filter(pl.col("degenerate").is_not_null())
        .group_by(bin=reached.cast(pl.Int64))
        .agg(pl.len(), pl.col("degenerate").sum())
        .sort("bin")
    )
    return tuple(TurnBin(_TURN_LABELS[b], *counts) for b, *counts in bins.collect().iter_rows())
