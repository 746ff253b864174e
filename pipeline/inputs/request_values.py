"""The values of a request's fields, checked by their types. Knows no fields together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal

from pipeline import constraints
from pipeline.generation import ROW_RULES
from pipeline.inputs.bad_cell import BadCell, check_unicode
from pipeline.inputs.request_fields import OBEYED
from pipeline.request_rules import REQUEST_RULES


def read_value(name: str, value: object) -> object:
    """What the field `name` of a request says; None: nothing. Raises BadCell."""
    if OBEYED[name] == "constraint":
        return _read_constraint(name, value)
    wanted, read = _READERS[OBEYED[name]]
    try:
        return read(value)
    except BadCell as error:
        raise BadCell(f"{name}: {error}") from None
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise BadCell(f"{name} must be {wanted}, not {type(value).__name__}") from None


def _read_constraint(name: str, value: object) -> str | None:
    try:
        return constraints.of_request(name, value)
    except ValueError as error:
        raise BadCell(str(error)) from None


def _number(value: object) -> float:
    """Of a decimal, which databases write, the float."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError
    return float(value)


def _integer(value: object) -> int:
    """Also a float that is whole: a column of integers with a gap is one of floats to pandas."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError
    whole = int(value)
    if whole != value or whole not in _INT64:
        raise ValueError
    return whole


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise TypeError
    check_unicode(*stops)
    return tuple(stops)


def _logprobs(value: object) -> int | bool:
    return value if isinstance(value, bool) else _integer(value)


def _token_ids(value: object) -> list[int]:
    """Also as JSON text, as a cell of a CSV file has them."""
    said = json.loads(value) if isinstance(value, str) else value
    if not isinstance(said, list):
        raise TypeError
    return [_integer(item) for item in said]


def _biases(value: object) -> dict[int, float]:
    """Of an object; a struct of a table has every field in every row, many of them null. Pairs:
    what a table of maps has."""
    said = json.loads(value) if isinstance(value, str) else value
    pairs = list(said.items()) if isinstance(said, dict) else said
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise TypeError
    pairs = [(_token_id(token), _number(bias)) for token, bias in pairs if bias is not None]
    if len({token for token, _ in pairs}) < len(pairs):
        raise BadCell("a token is named twice; leave one of the two")
    return dict(pairs)


def _token_id(name: object) -> int:
    """Python would take " 5", "5_0" and "05" as well, and one of two that are the same would go."""
    if isinstance(name, str):
        if not name.isascii() or not name.isdecimal() or name != str(int(name[:20])):
            raise BadCell("a token id must be a whole number without zeros or blanks before it")
        name = int(name)
    return _integer(name)


def _budget(value: object) -> int | None:
    """-1: none, as vLLM's client says it."""
    number = _integer(value)
    return None if number == -1 else number


_INT64 = range(-(2**63), 2**63)
_COUNTS = (
    "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "top_k", "seed", "n", "best_of",
    "top_logprobs", "min_tokens",
)  # fmt: skip
_PENALTIES = ("presence_penalty", "frequency_penalty")
_YES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_READERS: Mapping[str, tuple[str, Callable[[object], object]]] = {
    **dict.fromkeys((*ROW_RULES, *_PENALTIES, "temperature", "top_p"), ("a number", _number)),
    **dict.fromkeys(_COUNTS, ("a whole number of 64 bits", _integer)),
    "thinking_budget": ("a whole number of 64 bits", _budget),
    "stop": ("a text that is not empty, or a list of them", _stops),
    **dict.fromkeys(_YES, ("true or false", _boolean)),
    "bad_words": ("a list of texts that are not empty", _stops),
    **dict.fromkeys(("allowed_token_ids", "stop_token_ids"), ("a list of token ids", _token_ids)),
    "logit_bias": ("an object of token ids and numbers", _biases),
    "logprobs": ("true, false or a whole number", _logprobs),
}
assert _READERS.keys() >= {*REQUEST_RULES}
