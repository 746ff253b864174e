"""Figures of rows that were computed both ways, and what they decide."""

from __future__ import annotations

import random
from dataclasses import asdict

import numpy as np
import pytest

from pipeline.binomial import clopper_pearson_lower
from pipeline.job.agreement import (
    Agreement,
    ComparedRow,
    by_documents,
    describe_calibration,
    objections,
)
from pipeline.reuse_settings import ReuseSettings


def row(documents: int, same: bool, choice: list[bool], kl: list[float]) -> ComparedRow:
    return ComparedRow(documents, same, np.array(choice, bool), np.array(kl, np.float64))


def random_rows(draw: random.Random, count: int) -> list[ComparedRow]:
    rows = []
    for _ in range(count):
        positions = draw.randrange(1, 6)
        kl = [draw.random() for _ in range(draw.randrange(positions + 1))]
        choice = [draw.random() < 0.8 for _ in range(positions)]
        rows.append(row(draw.randrange(1, 4), all(choice), choice, kl))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_a_loop_over_all_positions(seed: int) -> None:
    draw = random.Random(seed)
    rows = random_rows(draw, draw.randrange(1, 30))
    found = Agreement.of(rows, 1000)
    divergences, choices, same = [], [], 0
    for one in rows:
        same += int(one.is_same)
        divergences += one.kl.tolist()
        choices += one.same_choice.tolist()
    assert (found.rows, found.same, found.of_rows) == (len(rows), same, 1000)
    assert found.lower_bound == clopper_pearson_lower(same, len(rows))
    assert found.same_choice == pytest.approx(sum(choices) / len(choices))
    if divergences:
        assert found.mean_kl == pytest.approx(sum(divergences) / len(divergences))
    groups = by_documents(rows, {1: 500, 2: 300, 3: 200})
    assert [g["documents"] for g in groups] == sorted({one.documents for one in rows})
    assert sum(int(g["same"] or 0) for g in groups) == same
    for group in groups:
        alike = [one for one in rows if one.documents == group["documents"]]
        assert group["rows"] == len(alike)
        assert group["lower_bound"] == Agreement.of(alike, 1000).lower_bound


def test_where_all_rows_were_computed_there_is_nothing_to_bound() -> None:
    rows = [row(2, True, [True], [0.0])] * 9 + [row(2, False, [False], [0.0])]
    assert Agreement.of(rows, 10).lower_bound == 0.9
    assert Agreement.of(rows, 11).lower_bound == clopper_pearson_lower(9, 10) < 0.9


@pytest.mark.parametrize(
    ("differing", "kl", "said"),
    [
        (2, 0.05, []),
        (3, 0.05, ["--min-agreement"]),
        (0, 0.051, ["--max-kl"]),
        (64, 2.0, ["--min-agreement", "--max-kl"]),
        (0, float("nan"), ["cannot be compared"]),
        (0, float("inf"), ["cannot be compared"]),
    ],
)
def test_both_bars_must_hold(differing: int, kl: float, said: list[str]) -> None:
    rows = [row(3, i >= differing, [True], [kl]) for i in range(64)]
    reasons = objections(Agreement.of(rows, 10_000), ReuseSettings(reuse="concat"))
    assert len(reasons) == len(said)
    assert all(name in reason for name, reason in zip(said, reasons, strict=True))


def test_nothing_compared_is_no_agreement() -> None:
    found = Agreement.of([], 5)
    assert (found.lower_bound, found.mean_kl, found.same_choice) == (0.0, None, None)
    assert len(objections(found, ReuseSettings(reuse="concat"))) == 2


def sentence(rows: list[ComparedRow], of_rows: int, decision: str = "reuse") -> str:
    found = Agreement.of(rows, of_rows)
    return describe_calibration(
        {
            "decision": decision, "asked_rows": 64, "agreement": asdict(found),
            "reasons": objections(found, ReuseSettings(reuse="concat")),
            "cost": {"seconds": 2.0, "prefilled_tokens": 1_000, "generated_tokens": 500},
        }
    )  # fmt: skip


def test_a_person_is_told_how_many_rows_and_of_how_many() -> None:
    rows = [row(3, i > 1, [True, False], [0.01]) for i in range(64)]
    assert sentence(rows, 900) == (
        "62 of 64 rows get the answer of full attention (1,500 tokens, 2.0 s); of all 900 at "
        "least 90.5%, with 95 % confidence; mean KL 0.01 nats, the same likeliest token at "
        "50.0%; documents are reused"
    )
    assert sentence(rows, 64).startswith("62 of all 64 rows get the answer of full attention (1,")
    assert sentence(rows[:10], 10, "fallback") == (
        "8 of all 10 rows get the answer of full attention (1,500 tokens, 2.0 s); 80.0% of the "
        "answers agree, and --min-agreement asks for 90.0%; so whole prompts are computed, as by "
        "--reuse prefix"
    )
