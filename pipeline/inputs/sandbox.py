"""Jinja's sandbox, with an end to what one step of a template may make. Knows no rows.

Jinja itself bounds `range`. Bounded here: what an operator makes of small operands
(`'a' * 10**10`), and the numbers that methods and filters are given (`'a' | center(10**10)`). Not
bounded: texts that grow step by step (`x ~ x` in a loop) until memory or the time of a row ends.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.namespace import SafeNamespace

MOST_ITEMS = 10_000_000
"""Characters or items that one step may make, and the largest number that it may be given."""
_MOST_BITS = 1_000_000  # of an integer
_LONG_NUMBER = re.compile(r"\d{8}")  # a width in a format


class Sandbox(ImmutableSandboxedEnvironment):
    """`order.items` is the field of a struct, where it has one, and not the method of a dict."""

    # Also keeps the compiler from computing them, before there is a row to blame.
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.filters["random"]  # the same row must give the same prompt tomorrow
        del self.globals["lipsum"]
        self.globals["namespace"] = SafeNamespace
        for name, own in self.filters.items():
            self.filters[name] = _bounded(own)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See Jinja. Raises OverflowError where the result would be huge."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See Jinja, which asks this of every attribute. Raises OverflowError."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See Jinja, whose names leave room for keyword arguments. Raises OverflowError."""
        _check_numbers(*args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)


def _bounded(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)  # with the mark by which Jinja knows what to pass first
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args, *kwargs.values())
        if own.__name__ == "do_format":
            _check_format(args[0])
        return own(*args, **kwargs)

    return call


def _check_numbers(*given: object) -> None:
    if any(isinstance(number, int) and abs(number) > MOST_ITEMS for number in given):
        raise OverflowError


def _check_format(template: object) -> None:
    if isinstance(template, str) and _LONG_NUMBER.search(template):
        raise OverflowError


def _check_operands(operator: str, left: Any, right: Any) -> None:
    size = 0
    if isinstance(left, int) and isinstance(right, int):
        if operator in ("*", "**") and _bits(operator, left, right) > _MOST_BITS:
            raise OverflowError
    elif operator == "+":
        size = _length(left) + _length(right)
    elif operator == "*":
        times = left if isinstance(left, int) else right if isinstance(right, int) else 0
        size = (_length(left) + _length(right)) * times  # a number has no length
    elif operator == "%":
        _check_format(left)
        _check_numbers(*(right if isinstance(right, tuple) else (right,)))
    if size > MOST_ITEMS:
        raise OverflowError


def _bits(operator: str, left: int, right: int) -> int:
    """An upper bound of the bits that `left * right` or `left ** right` needs."""
    if operator == "**":
        return left.bit_length() * max(0, right)
    return left.bit_length() + right.bit_length()


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0
