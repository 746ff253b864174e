"""Whether an answer fits its JSON schema, by a validator that shares nothing with the masks.

It runs in a child, which starts sooner for knowing no tables. Numbers are held to a
schema as they are written: by floats, 0.07 is no multiple of 0.01.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal, InvalidOperation, localcontext
from typing import Final

from pipeline.confined import Fault

_FITS: Final = "fits"
DOES_NOT: Final = "does not fit"
_DIGITS: Final = 2_000  # of a number of an answer, and of what it is divided by


def make_judge() -> Callable[[tuple[str, str]], str | Fault]:
    """Of a text and a constraint: whether it fits; runs in the child."""

    def judge(item: tuple[str, str]) -> str | Fault:
        try:
            return _FITS if fits(*item) else DOES_NOT
        except Exception as error:  # a reference that leads nowhere, a pattern of another dialect
            return Fault(f"the schema cannot be used ({type(error).__name__})")

    return judge


def fits(text: str, constraint: str) -> bool:
    """Whether a text is JSON that fits the schema of a constraint."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    validator = extend(
        Draft202012Validator,
        type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_whole),
    )
    schema = json.loads(constraint, parse_float=_number)["json_schema"]
    try:
        with localcontext(prec=_DIGITS):
            return bool(validator(schema).is_valid(json.loads(text, parse_float=_number)))
    except (ValueError, RecursionError):
        return False


def _number(text: str) -> Decimal | float:
    try:
        return Decimal(text)
    except InvalidOperation:  # of an exponent with twenty digits
        return float(text)


def _is_whole(_: object, value: object) -> bool:
    if isinstance(value, Decimal):
        return value == value.to_integral_value()
    return isinstance(value, int) and not isinstance(value, bool)
