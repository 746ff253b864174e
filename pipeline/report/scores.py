"""What the scores of a run look like, from its rows. Draws nothing, reads no files.

Choices are named by their places, and by their texts only where the settings say these: a report
travels, and holds no text of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from pipeline.storage.schema import SCORE_FIELDS

LOW_MARGIN: Final = 0.1
"""Of probability between the likeliest choice and the second."""
LOW_MASS: Final = 0.1
_MASS_EDGES: Final = (0.01, 0.1, 0.5, 0.9, 0.99)
_MASS_LABELS: Final = ("below 1 %", "1–10 %", "10–50 %", "50–90 %", "90–99 %", "over 99 %")
_SHOWN_CHOICES: Final = 12
_SHOWN_ROWS: Final = 10
_NAMES: Final = {field.name for field in SCORE_FIELDS}


@dataclass(frozen=True)
class ScoreHealth:
    """Of answered rows. `by_choice`: (choice, rows) by place; `by_mass`: (label, rows) where every
    choice is one token; `low_mass`: of these, rows whose choices the model hardly considers;
    `low_margin`: rows with more than one choice of which two are almost alike, the closest named in
    `closest` as (id, margin); `cut`: rows whose context gave up its beginning; `perplexity`: over
    all tokens, where prompts are scored themselves."""

    rows: int
    with_choices: int
    by_choice: tuple[tuple[str, int], ...]
    by_mass: tuple[tuple[str, int], ...]
    low_mass: int
    low_margin: int
    closest: tuple[tuple[str, float], ...]
    cut: int
    scored_tokens: int
    perplexity: float | None

    @property
    def alarms(self) -> list[str]:
        """What a person should look at, in sentences."""
        massed = sum(rows for _, rows in self.by_mass)
        said = [
            (self.low_mass, massed, "rows give all their choices together less than 10 %: the "
             "model wanted none of them, look at how the prompt ends and choices begin"),
            (self.cut, self.rows, "rows lost the beginning of their context, which nothing shares"),
        ]  # fmt: skip
        return [f"{count:,} of {total:,} {what}" for count, total, what in said if count]


def measure_scores(output: pl.LazyFrame, settings: dict[str, Any]) -> ScoreHealth | None:
    """None where answers are generated. `output` is scanned, never loaded whole; `settings`: those
    of the run."""
    if not set(output.collect_schema().names()) >= _NAMES:
        return None
    rows = output.filter(pl.col("status") == "ok")
    best, second = (_by_probability(place) for place in (0, 1))
    margins = rows.with_columns(margin=best - second).filter(pl.col("margin").is_not_null())
    mass = pl.col("label_mass")
    found = rows.select(
        rows=pl.len(),
        with_choices=pl.col("choice_index").is_not_null().sum(),
        low_mass=(mass < LOW_MASS).sum(),
        cut=(pl.col("cut_tokens") > 0).sum(),
        scored_tokens=pl.col("token_counts").list.sum().cast(pl.Int64).sum(),
        whole=pl.col("perplexity").is_not_null().sum(),
        total=pl.col("loglikelihoods").list.sum().sum(),
    )
    counted = found.collect().row(0, named=True)
    whole, total = counted.pop("whole"), counted.pop("total")
    tokens = counted["scored_tokens"]
    closest = margins.sort("margin", "row_index").head(_SHOWN_ROWS).select("id", "margin")
    return ScoreHealth(
        **counted,
        by_choice=_by_choice(rows, settings),
        by_mass=_by_mass(rows),
        low_margin=int(margins.select((pl.col("margin") < LOW_MARGIN).sum()).collect().item()),
        closest=tuple((name, margin) for name, margin in closest.collect().iter_rows()),
        perplexity=math.exp(min(700.0, -total / tokens)) if whole and tokens else None,
    )


def _by_probability(place: int) -> pl.Expr:
    ordered = pl.col("probabilities").list.sort(descending=True)
    return ordered.list.get(place, null_on_oob=True)


def _by_choice(rows: pl.LazyFrame, settings: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    chosen = rows.filter(pl.col("choice_index").is_not_null())
    counts = dict(chosen.group_by("choice_index").agg(pl.len()).collect().iter_rows())
    texts = settings.get("scoring", {}).get("choices", ())
    named = dict(enumerate(texts))
    ordered = sorted(counts, key=lambda place: (-counts[place], place))
    shown = [(_name(place, named), counts[place]) for place in ordered[:_SHOWN_CHOICES]]
    rest = sum(counts[place] for place in ordered[_SHOWN_CHOICES:])
    return (*shown, ("others", rest)) if rest else tuple(shown)


def _name(place: int, named: dict[int, str]) -> str:
    return f"{place + 1}: {named[place]!r}" if place in named else str(place + 1)


def _by_mass(rows: pl.LazyFrame) -> tuple[tuple[str, int], ...]:
    known = rows.filter(pl.col("label_mass").is_not_null())
    reached = pl.sum_horizontal(pl.col("label_mass") >= edge for edge in _MASS_EDGES)
    counts = dict(known.group_by(bin=reached.cast(pl.Int64)).agg(pl.len()).collect().iter_rows())
    if not counts:
        return ()
    return tuple((label, counts.get(place, 0)) for place, label in enumerate(_MASS_LABELS))
