"""What the scores of a run look like, from its rows. Draws nothing, reads no files.

Choices are named by their places, and by their texts only where the settings say these: a report
travels, and holds no text of rows. Labels of questions are the settings' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from pipeline.questions import Question
from pipeline.storage.schema import SCORE_FIELDS

LOW_MARGIN: Final = 0.1
"""Of probability between the likeliest choice and the second."""
LOW_MASS: Final = 0.1
_MASS_EDGES: Final = (0.01, 0.1, 0.5, 0.9, 0.99)
_MASS_LABELS: Final = ("below 1 %", "1–10 %", "10–50 %", "50–90 %", "90–99 %", "over 99 %")
_SHOWN_CHOICES: Final = 12
_SHOWN_ROWS: Final = 10
_SHOWN_QUESTIONS: Final = 40
_NAMES: Final = {field.name for field in SCORE_FIELDS}
Bins = tuple[tuple[str, int], ...]
"""(label, rows) of each bin."""


@dataclass(frozen=True)
class ChoiceHealth:
    """What was chosen in answered rows: of a row's choices, or the labels of the question `name`.

    `by_choice`: (choice, rows) by place; `by_mass`: (label, rows) where every choice is one token;
    `low_mass`: of these, rows whose choices the model hardly considers; `low_margin`: rows with
    more than one choice of which two are almost alike, the closest named in `closest` as (id,
    margin); `mean` of a scale.
    """

    with_choices: int
    by_choice: Bins
    by_mass: Bins
    low_mass: int
    low_margin: int
    closest: tuple[tuple[str, float], ...]
    name: str = ""
    mean: float | None = None

    @property
    def alarm(self) -> str | None:
        """What a person should look at."""
        if not self.low_mass:
            return None
        about = f"the question {self.name!r}: " if self.name else ""
        massed, what = sum(rows for _, rows in self.by_mass), "labels" if self.name else "choices"
        return (
            f"{about}{self.low_mass:,} of {massed:,} rows give all their {what} together less than "
            f"10 %: the model wanted none of them, look at how the prompt ends and {what} begin"
        )


@dataclass(frozen=True)
class ScoreHealth:
    """Of answered rows. `chosen`: of their choices, or of each question, of which `num_questions`
    are asked; `cut`: rows whose context gave up its beginning; `perplexity`: over all tokens, where
    prompts are scored themselves."""

    rows: int
    chosen: tuple[ChoiceHealth, ...]
    num_questions: int
    cut: int
    scored_tokens: int
    perplexity: float | None

    @property
    def alarms(self) -> list[str]:
        """What a person should look at, in sentences."""
        found = [alarm for one in self.chosen if (alarm := one.alarm) is not None]
        if self.cut:
            found.append(
                f"{self.cut:,} of {self.rows:,} rows lost the beginning of their context, which "
                "nothing shares"
            )
        return found


@dataclass(frozen=True)
class _Columns:
    """Where a choice lies in the output: its place, which bins are named by `names`; probabilities
    of all; their total before they were compared."""

    place: pl.Expr
    probabilities: pl.Expr
    mass: pl.Expr
    names: Mapping[int, str]


def measure_scores(output: pl.LazyFrame, manifest: Mapping[str, Any]) -> ScoreHealth | None:
    """None where answers are generated. `output` is scanned, never loaded whole; `manifest`: the
    run.json of the run."""
    if not set(output.collect_schema().names()) >= _NAMES:
        return None
    rows = output.filter(pl.col("status") == "ok")
    found = rows.select(
        rows=pl.len(),
        cut=(pl.col("cut_tokens") > 0).sum(),
        scored_tokens=pl.col("token_counts").list.sum().cast(pl.Int64).sum(),
        whole=pl.col("perplexity").is_not_null().sum(),
        total=pl.col("loglikelihoods").list.sum().sum(),
    )
    counted = found.collect().row(0, named=True)
    whole, total = counted.pop("whole"), counted.pop("total")
    tokens = counted["scored_tokens"]
    asked = [Question.recorded(said) for said in manifest.get("questions", ())]
    settings = manifest.get("settings", {})
    chosen = _of_questions(rows, asked) if asked else (_of_choices(rows, settings),)
    return ScoreHealth(
        **counted,
        chosen=chosen,
        num_questions=len(asked),
        perplexity=math.exp(min(700.0, -total / tokens)) if whole and tokens else None,
    )


def _of_choices(rows: pl.LazyFrame, settings: Mapping[str, Any]) -> ChoiceHealth:
    texts = settings.get("scoring", {}).get("choices", ())
    place, names = pl.col("choice_index"), {i: f"{i + 1}: {text!r}" for i, text in enumerate(texts)}
    columns = _Columns(place, pl.col("probabilities"), pl.col("label_mass"), names)
    return _measure(rows, columns, "", None)


def _of_questions(rows: pl.LazyFrame, questions: Sequence[Question]) -> tuple[ChoiceHealth, ...]:
    found, low = [], 0
    for question in questions[:_SHOWN_QUESTIONS]:
        probabilities = pl.col("probabilities").list.slice(low, len(question.labels))
        low += len(question.labels)
        mass = pl.col(question.columns[-1])
        names = dict(enumerate(question.labels))
        columns = _Columns(probabilities.list.arg_max(), probabilities, mass, names)
        mean = pl.col(question.name).mean() if question.kind == "scale" else None
        found.append(_measure(rows, columns, question.name, mean))
    return tuple(found)


def _measure(
    rows: pl.LazyFrame, columns: _Columns, name: str, mean: pl.Expr | None
) -> ChoiceHealth:
    best, second = (_by_probability(columns.probabilities, place) for place in (0, 1))
    margins = rows.with_columns(margin=best - second).filter(pl.col("margin").is_not_null())
    counted = rows.select(
        with_choices=columns.place.is_not_null().sum(), low_mass=(columns.mass < LOW_MASS).sum()
    )
    closest = margins.sort("margin", "row_index").head(_SHOWN_ROWS).select("id", "margin")
    return ChoiceHealth(
        **counted.collect().row(0, named=True),
        by_choice=_by_choice(rows, columns),
        by_mass=_by_mass(rows, columns.mass),
        low_margin=int(margins.select((pl.col("margin") < LOW_MARGIN).sum()).collect().item()),
        closest=tuple((row, margin) for row, margin in closest.collect().iter_rows()),
        name=name,
        mean=None if mean is None else rows.select(mean).collect().item(),
    )


def _by_probability(probabilities: pl.Expr, place: int) -> pl.Expr:
    return probabilities.list.sort(descending=True).list.get(place, null_on_oob=True)


def _by_choice(rows: pl.LazyFrame, columns: _Columns) -> Bins:
    places = rows.select(place=columns.place.cast(pl.Int64)).drop_nulls()
    counts = dict(places.group_by("place").agg(pl.len()).collect().iter_rows())
    ordered = sorted(counts, key=lambda place: (-counts[place], place))
    shown = [
        (columns.names.get(place, str(place + 1)), counts[place])
        for place in ordered[:_SHOWN_CHOICES]
    ]
    rest = sum(counts[place] for place in ordered[_SHOWN_CHOICES:])
    return (*shown, ("others", rest)) if rest else tuple(shown)


def _by_mass(rows: pl.LazyFrame, mass: pl.Expr) -> Bins:
    known = rows.select(mass=mass).drop_nulls()
    reached = pl.sum_horizontal(pl.col("mass") >= edge for edge in _MASS_EDGES)
    counts = dict(known.group_by(bin=reached.cast(pl.Int64)).agg(pl.len()).collect().iter_rows())
    if not counts:
        return ()
    return tuple((label, counts.get(place, 0)) for place, label in enumerate(_MASS_LABELS))
