"""One row that a library fails on, whatever it raises, is told from the rows beside it.

A batch goes through in one call. Only if that fails it is halved, until the row to blame is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from pipeline.errors import is_row_fault
from pipeline.unheard import panics_unheard

Item = TypeVar("Item")
Result = TypeVar("Result")


def call_by_halves(
    call: Callable[[Sequence[Item]], Result], items: Sequence[Item]
) -> Iterator[tuple[int, Result | BaseException]]:
    """(first place, what `call` makes of the items from there on), until all are through.

    Where it fails on one item alone, the error stands for the result.
    """
    stack = [(0, len(items))] if len(items) else []
    while stack:
        low, high = stack.pop()
        try:
            with nullcontext() if high - low == len(items) > 1 else panics_unheard():
                result: Result | BaseException = call(items[low:high])
        except BaseException as error:
            if not is_row_fault(error):
                raise
            if high - low > 1:
                middle = (low + high) // 2
                stack += [(middle, high), (low, middle)]
                continue
            result = error
        yield low, result


def sentence(what: str, error: BaseException) -> str:
    """Without what the error says, which may quote the row."""
    return f"{what} ({type(error).__name__})"
