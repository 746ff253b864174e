"""How people write sizes, durations and shares of rows: one grammar for every setting and flag.

```
 size      8GiB  1TiB  500MB  1048576        bytes
 duration  4h30m  90m  90s  1.5h  3600       seconds
 share     5%  0.05  1.0                     of all rows; a whole number is a count of them
```
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fractions import Fraction
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_SIZE = re.compile(rf"({_NUMBER})\s*([a-z]*)", re.IGNORECASE)
_KUBERNETES = re.compile(r"[kmgtpe]i", re.IGNORECASE)  # `8Gi`, as its manifests have it
_STEP = rf"({_NUMBER})\s*([smhd])"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_byte_size = TypeAdapter(ByteSize)
_MOST_QUOTED = 200  # characters of a text, bits of a number


def parse_size(text: str | int) -> int:
    """`8GiB`, `500MB`, `1024` -> bytes. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(str(text).strip())
    try:
        if match is None or isinstance(text, bool):
            raise ValueError
        unit = f"{match[2]}b" if _KUBERNETES.fullmatch(match[2]) else match[2]
        return int(_byte_size.validate_python(f"{float(match[1]):f}{unit}"))
    except (ValueError, OverflowError):  # ValidationError is a ValueError
        raise ValueError(f"{text!r} is not a size; write it like 8GiB, 500MB or 1048576") from None


def parse_duration(text: str | float) -> float:
    """`4h30m`, `90s`, `30` -> seconds. Raises ValueError for anything else."""
    written = str(text).strip().lower()
    if re.fullmatch(_NUMBER, written):
        return float(written)
    if not re.fullmatch(rf"(?:{_STEP}\s*)+", written):
        raise ValueError(f"{text!r} is not a duration; write it like 4h30m, 90s or 3600")
    return float(sum(float(number) * _SECONDS[u] for number, u in re.findall(_STEP, written)))


def parse_share(text: str | float) -> float:
    """`5%`, `0.05`, `1` -> a share in [0, 1]. Raises ValueError for anything else."""
    return float(_exact_share(text))


def _exact_share(text: str | float) -> Fraction:
    match = re.fullmatch(rf"({_NUMBER}(?:e-?\d+)?)\s*(%?)", str(text).strip(), re.IGNORECASE)
    share = Fraction(-1) if match is None else Fraction(match[1]) / (100 if match[2] else 1)
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} is not a share; write it like 5% or 0.05")
    return share


def parse_row_limit(text: str | float) -> str:
    """`5%`, `0.05` (a share of the rows) or `50` (so many rows), as it was written.

    Raises ValueError for anything else.
    """
    written = str(text).strip()
    if not re.fullmatch(r"[0-9]+", written):
        try:
            _exact_share(written)
        except ValueError:
            raise ValueError(
                f"{text!r} is neither a share like 5% or 0.05 nor a number of rows like 50"
            ) from None
    return written


def rows_of(limit: str, total: int) -> Fraction:
    """Of a row limit: how many of `total` rows it means, exactly."""
    return Fraction(limit) if limit.isdigit() else _exact_share(limit) * total


def named_values(value: object) -> list[tuple[Any, Any]]:
    """Of a mapping, or of texts like `name=value`, or one such text. Raises ValueError."""
    if isinstance(value, dict):
        return list(value.items())
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError("write it as name=value")
    pairs = [str(text).partition("=") for text in texts]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write it as name=value, like region=eu-west-1")
    return [(name, content) for name, _, content in pairs]


def write_size(count: int) -> str:
    """As `parse_size` reads it, with the largest unit that divides it: `2GiB`."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << power) == 0:
            return f"{count >> power}{unit}"
    return str(count)


def write_duration(seconds: float) -> str:
    """As `parse_duration` reads it: `4h30m`, `90s` as `1m30s`, `0`."""
    left, text = round(seconds), ""
    for length, unit in ((3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, length)
        text += f"{count}{unit}" if count else ""
    return text or "0"


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Share = Annotated[float, BeforeValidator(parse_share)]
RowLimit = Annotated[str, BeforeValidator(parse_row_limit)]


class Section(BaseModel):
    """Some settings that belong together. What is not known, or of another kind, is refused: to
    pydantic true is the number 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: object, said: ValidationInfo) -> object:
        annotation = cls.model_fields[str(said.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("must not be true or false")
        if not are_texts(value):
            raise ValueError("holds half a surrogate pair, which is not text")
        return value


def are_texts(value: object) -> bool:
    """Whether all texts in a value can be written: JSON and YAML can spell half a surrogate pair,
    and lists in themselves."""
    left, seen = [value], set[int]()
    while left:
        one = left.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            left += [*one, *one.values()] if isinstance(one, dict) else one
    return True


def unknown_name(name: str, known: Iterable[str], remedy: str) -> str:
    """What to say of a setting that nobody knows: the nearest one that exists, or the remedy."""
    spelled = {one.replace("_", "-"): None for one in known}
    name = name.replace("_", "-")
    near = get_close_matches(name.lower(), spelled, 1)
    return f"unknown setting {name!r}; {f'did you mean {near[0]}?' if near else remedy}"


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def refuse_beside(flag: str, others: Mapping[str, bool]) -> None:
    """Raises ValueError for the first of the other flags that is there."""
    for other, is_there in others.items():
        if is_there:
            raise ValueError(f"{flag} does not work with {other}; leave one of the two out")


# What pydantic says, in a person's words; the numbers and choices are those of the field.
_WORDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "path_type": "must be a path",
    "dict_type": "must be a mapping, like name: value",
    "missing": "must be given",
}


def say_fault(
    error: ValidationError, private: Iterable[str] = (), groups: Iterable[str] = ()
) -> str:
    """The first fault of some settings in one sentence: `setting NAME: what is wrong (got X)`.

    What was written is quoted where it is one plain value that the reason does not quote, and the
    setting, or its group, is not `private`. A fault of several settings of one of the `groups`
    names them itself.
    """
    first = error.errors(include_url=False)[0]
    words, where = _WORDS.get(first["type"]), list(first["loc"])
    reason = first["msg"] if words is None else words.format_map(first.get("ctx", {}))
    reason = reason.removeprefix("Value error, ")
    if not where or (len(where) == 1 and where[0] in set(groups)):
        return reason
    names = [part for part in where if isinstance(part, str)]
    value = first["input"]
    is_shown = _is_short(value) and not set(names) & set(private)
    got = f" (got {value!r})" if is_shown and repr(value) not in reason else ""
    return f"setting {names[-1].replace('_', '-')}: {reason}{got}"


def _is_short(value: object) -> bool:
    """Whether it is one plain value that fits into a sentence."""
    if isinstance(value, str):
        return len(value) <= _MOST_QUOTED
    if isinstance(value, int):
        return value.bit_length() <= _MOST_QUOTED
    return isinstance(value, float)
