"""Columns that folders named `key=value` stand for, as Hive and its kin write them. Reads nothing.

```
 coppice run logs       logs/date=2026-11-22/lang=de/x.parquet  ─►  date: 2026-11-22, lang: de
 coppice run logs/date=2026-11-22                               ─►  lang: de, for the files below
```
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.selection import fixed_parts

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INT64 = range(-(2**63), 2**63)


def read_partitions(argument: str | Path, names: Sequence[str]) -> pa.Table:
    """What the folders between `argument` and each file say: [files] rows, a column for each key.

    Of a glob the part before the first wildcard counts as the argument. A column is int64 where
    all its values are whole numbers in their shortest form, else large_string.

    Raises InputError where files differ in their keys, or a folder is not text.
    """
    found = [_values(name, _folders(argument, name)) for name in names]
    for name, values in zip(names, found, strict=True):
        if values.keys() != found[0].keys():
            raise InputError(
                f"{names[0]} lies below folders of {_listed(found[0])}, but {name} of "
                f"{_listed(values)}; bring the folders to the same keys or run them one by one"
            )
    return pa.table({key: _column([values[key] for values in found]) for key in found[0]})


def _folders(argument: str | Path, name: str) -> tuple[str, ...]:
    """Names of the folders below the argument, or below its fixed part, that the file lies in."""
    path, top = PurePosixPath(name), PurePosixPath(argument)
    if not path.is_relative_to(top):
        top = PurePosixPath(*top.parts[: fixed_parts(str(argument))])
    return path.relative_to(top).parent.parts if path.is_relative_to(top) else ()


def _values(name: str, folders: Sequence[str]) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for folder in folders:
        key, equals, value = folder.partition("=")
        if not key or not equals:
            continue
        key = _decode(name, key)
        if key in values:
            raise InputError(f"{name} lies below two folders of {key!r}; rename one of them")
        values[key] = None if value == _NULL else _decode(name, value)
    return values


def _decode(name: str, text: str) -> str:
    try:
        text = unquote(text, errors="strict")
        text.encode()
    except UnicodeError:
        raise InputError(f"a folder of {name!r} is not text in UTF-8; rename it") from None
    return text


def _column(values: list[str | None]) -> pa.Array:
    if any(values) and all(value is None or _is_integer(value) for value in values):
        return pa.array([None if value is None else int(value) for value in values], pa.int64())
    return pa.array(values, pa.large_string())


def _is_integer(value: str) -> bool:
    try:
        return str(int(value)) == value and int(value) in _INT64
    except ValueError:
        return False


def _listed(values: dict[str, str | None]) -> str:
    return ", ".join(map(repr, values)) or "no key"
