"""Bounds of a share against exact sums over whole numbers."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from pipeline.binomial import clopper_pearson_lower, clopper_pearson_upper


def chance_of_at_least(hits: int, trials: int, share: Fraction) -> Fraction:
    """The slow oracle: no logarithm, no float."""
    terms = (
        comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(hits, trials + 1)
    )
    return sum(terms, Fraction(0))


@pytest.mark.parametrize("trials", [1, 2, 7, 64])
def test_the_lower_bound_is_the_share_at_which_so_many_are_seen_once_in_twenty(trials: int) -> None:
    for hits in {0, 1, trials // 2, trials - 1, trials}:
        bound = clopper_pearson_lower(hits, trials)
        if not hits:
            assert bound == 0.0
            continue
        near = Fraction(1, 10**9)
        assert chance_of_at_least(hits, trials, Fraction(bound) - near) < Fraction(1, 20)
        assert chance_of_at_least(hits, trials, Fraction(bound) + near) > Fraction(1, 20)


def test_of_64_rows_two_may_differ_where_nine_tenths_must_agree() -> None:
    assert clopper_pearson_lower(62, 64) >= 0.9 > clopper_pearson_lower(61, 64)
    assert clopper_pearson_lower(29, 29) >= 0.9 > clopper_pearson_lower(28, 28)
    assert clopper_pearson_lower(0, 0) == 0.0


def test_both_bounds_mirror_each_other() -> None:
    assert clopper_pearson_lower(60, 64) == 1.0 - clopper_pearson_upper(4, 64)
