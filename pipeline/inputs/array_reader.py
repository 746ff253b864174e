"""The items of a JSON file that is one list, found one by one. Knows no types of columns.

```
 [ {...}, {...}, {..     a window of the text, which grows only while one item does not end in it
   item   item   item
```
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import InputError
from pipeline.inputs.refused_lines import place_of

LONGEST = 256 << 20  # characters of an item, bytes of a line
MOST_VALUES = 10_000_000  # of an item or line; each takes some 60 bytes
_READ_AT_A_TIME = 1 << 20
_LONGEST_PIECE = 16  # of a number, a word or an escape that the end of the window cuts
_SPACE = " \t\r\n"


def is_list(stream: io.BufferedReader) -> bool:
    """Whether the text begins with a bracket; reads nothing."""
    start = stream.peek(_READ_AT_A_TIME).removeprefix(codecs.BOM_UTF8)
    return start.lstrip()[:1] == b"["


def read_items(
    name: str, stream: io.BufferedReader, refuse_constant: Callable[[int, str], float]
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(number from 1, object, its size as text) of all items of the list. `name`: to blame.

    `refuse_constant`: what to make of NaN and its kin in the item of this number.

    Raises InputError naming the first item that is no object, or where the list is broken.
    """
    window = _Window(name, stream, refuse_constant)
    window.take("[")
    while not window.ends():
        if window.number:
            window.take(",")
        item, size = window.take_object()
        yield window.number, item, size
    window.take("]")
    if window.peek():
        raise InputError(f"{name} goes on behind its list; make it one list, or a line a row")


class _Window:
    """A piece of the text of a list, and where in it we are. `number`: of the item, from 1."""

    def __init__(
        self, name: str, stream: io.BufferedReader, refuse: Callable[[int, str], float]
    ) -> None:
        self.number = 0
        self._name = name
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder(parse_constant=lambda said: refuse(self.number, said))
        self._text, self._at, self._has_all = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._has_all:
                return ""
            self._fill(0)

    def ends(self) -> bool:
        """Whether the list does. Raises InputError where the text does before it."""
        if not (found := self.peek()):
            raise InputError(
                f"{self._name} ends before its list does, after item {self.number}; write it again"
            )
        return found == "]"

    def take(self, wanted: str) -> None:
        """Step over this character. Raises InputError where another one stands there."""
        if self.peek() != wanted:
            after = f" after item {self.number}" if self.number else ""
            raise InputError(
                f"the list in {self._name} is broken{after}: there is no {wanted!r}; write it again"
            )
        self._at += 1

    def take_object(self) -> tuple[dict[str, Any], int]:
        """The object that begins here, the next item, and how long it is."""
        is_over = self.ends()
        self.number += 1
        if is_over or self.peek() != "{":
            raise self._no_object()
        found, end = self._decode_next()
        size, self._at = end - self._at, end
        return found, size

    def _decode_next(self) -> tuple[dict[str, Any], int]:
        while True:
            self._check_size()
            try:
                return self._decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise InputError(
                    f"{place_of(self._name, self.number)} has lists or objects too deep in one "
                    "another; put them into one field as text"
                ) from None
            except json.JSONDecodeError as error:
                if self._has_all or not self._is_cut(error):
                    raise self._no_object() from None
            self._fill(len(self._text) - self._at)  # as much again: the work stays linear

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether what follows could make it good."""
        is_open = error.msg.startswith("Unterminated string")
        return is_open or error.pos >= len(self._text) - _LONGEST_PIECE

    def _check_size(self) -> None:
        size, where = len(self._text) - self._at, place_of(self._name, self.number)
        if size >= LONGEST:
            raise InputError(
                f"{where} is longer than {LONGEST:,} characters; split it, or write the rows as "
                "Parquet"
            )
        if size > MOST_VALUES and sum(self._text.count(c, self._at) for c in ",[{") > MOST_VALUES:
            raise InputError(f"{where} holds over {MOST_VALUES:,} values; split it")

    def _fill(self, at_least: int) -> None:
        """Read on, by so many bytes or more."""
        more = self._stream.read(max(at_least, _READ_AT_A_TIME))
        self._has_all = not more
        try:
            decoded = self._decode(more, self._has_all)
        except UnicodeDecodeError:
            raise self._no_object() from None
        self._text, self._at = self._text[self._at :] + decoded, 0

    def _no_object(self) -> InputError:
        where = place_of(self._name, max(self.number, 1))
        return InputError(f"{where} is not a JSON object in UTF-8")
