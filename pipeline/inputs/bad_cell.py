"""Why a cell of the input cannot be used. No message quotes what it holds: it may be private."""

from __future__ import annotations

import json


class BadCell(ValueError):
    """The cell cannot be used; the message says why, without quoting it."""


def read_json(text: str) -> object:
    """The value that a cell spells. Raises BadCell."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise BadCell("the cell is not valid JSON") from None
    return value


def check_unicode(*texts: str) -> None:
    """Raises BadCell for half a surrogate pair."""
    # JSON can spell half a surrogate pair; no tokenizer can encode it and no Parquet file hold it.
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadCell("a text holds half a surrogate pair, which is not text") from None
