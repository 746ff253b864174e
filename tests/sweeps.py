"""Which cases of a sweep the fast suite takes: `make test-slow` takes the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def sweep(cases: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """For a parameter, or a tuple of them: all of the cases, slow but for those in `fast`."""
    every, chosen = list(cases), list(fast)
    unknown = [case for case in chosen if case not in every]
    assert not unknown, f"no such case: {unknown}"
    return [case if case in chosen else _slow(case) for case in every]


def diagonal(*axes: Sequence[Any]) -> list[Any]:
    """All combinations, slow but for as few as hold each value of each axis once."""
    count = max(map(len, axes))
    fast = [tuple(axis[at % len(axis)] for axis in axes) for at in range(count)]
    return sweep(itertools.product(*axes), fast)


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
