"""Advice on prompts whose faults are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.job.advice import advise, shared_share

INSTRUCTION = "Answer the question in one sentence.\nBe kind." * 5


def test_a_timestamp_in_the_first_line_is_found() -> None:
    prompts = [f"It is 02:{i:02d}\n{INSTRUCTION}\nQuestion {i * i}?" for i in range(60)]
    advice = advise(prompts)
    assert advice is not None and advice.line == 1 and advice.rows == 60
    moved = [f"{INSTRUCTION}\nQuestion {i * i}?\nIt is 02:{i:02d}" for i in range(60)]
    assert advice.shared_then == shared_share(moved)
    assert advice.cost == pytest.approx(1 - shared_share(prompts) / shared_share(moved))
    assert "02:" not in str(advice)  # of the prompt nothing is told


def test_prompts_that_share_all_they_can_get_no_advice() -> None:
    assert advise([f"{INSTRUCTION}\nQuestion {i}?" for i in range(60)]) is None
    assert advise(["one line", "another"]) is None
    assert advise([]) is None


@given(st.lists(st.text("ab", max_size=6), max_size=8))
def test_the_shared_share_is_that_of_all_prefixes(texts: list[str]) -> None:
    total = sum(map(len, texts))
    prefixes = {text[:n] for text in texts for n in range(1, len(text) + 1)}
    assert shared_share(texts) == pytest.approx(1 - len(prefixes) / total if total else 0.0)
