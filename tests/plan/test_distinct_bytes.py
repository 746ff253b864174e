"""Bytes of texts that are distinct, against a set of all beginnings."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.plan.distinct_bytes import count_distinct_bytes


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_number_of_distinct_beginnings(seed: int) -> None:
    draw = random.Random(seed)
    texts = [bytes(draw.choices(b"\x00ab\xff", k=draw.randrange(9))) for _ in range(60)]
    owner = [draw.randrange(3) for _ in texts]
    beginnings = {
        (who, text[:end])
        for who, text in zip(owner, texts, strict=True)
        for end in range(1, len(text) + 1)
    }
    assert count_distinct_bytes(texts, np.array(owner, np.int64)) == len(beginnings)


def test_nothing_has_none() -> None:
    assert count_distinct_bytes([], np.zeros(0, np.int64)) == 0
