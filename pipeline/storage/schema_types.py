"""The Arrow type of what a JSON schema describes, and values as that type takes them.

What no Arrow type holds exactly (objects with free names, alternatives of several types, recursion)
is kept as JSON text, as small a part of it as can be; so is what would be too deep or wide a
type. Knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

Schema = Mapping[str, Any]


class Form(NamedTuple):
    """A type, and what makes a value of JSON one of it."""

    type: pa.DataType
    convert: Callable[[Any], Any]

    def kept(self, value: Any) -> Any:
        """What a reader of the column finds of a converted value."""
        return pa.array([value], self.type).to_pylist()[0]


def _as_it_is(value: Any) -> Any:
    return value


def _as_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text == _encodable(text) else json.dumps(value, separators=(",", ":"))


def _encodable(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and no column can hold, is a question mark."""
    return text.encode(errors="replace").decode()


def _in_64_bits(value: int) -> int:
    """Raises OverflowError."""
    if not -(2**63) <= value < 2**63:
        raise OverflowError
    return value


def _as_float(value: float) -> float:
    """Raises OverflowError for a whole number that a float would change."""
    if float(value) != value:
        raise OverflowError
    return float(value)


JSON_TEXT: Final = Form(pa.string(), _as_text)
_NULL: Final = Form(pa.null(), _as_it_is)
_DEEPEST: Final = 32
"""Levels of a type: few readers take many more."""
_MOST_PARTS: Final = 2_000
"""Of a schema whose references are followed: each may stand in many places, and these in others."""
_SCALARS: Final = {
    "string": Form(pa.string(), _encodable),
    "boolean": Form(pa.bool_(), _as_it_is),
    "integer": Form(pa.int64(), _in_64_bits),
    "number": Form(pa.float64(), _as_float),
    "null": _NULL,
}
_BESIDE_REFERENCE: Final = {
    "$ref", "$defs", "$schema", "$id", "definitions", "title", "description", "default", "examples",
}  # fmt: skip
_DECIDED_ELSEWHERE: Final = {"properties", "items", "type", "$ref", "anyOf", "oneOf"}


def form_of(schema: Schema) -> Form:
    """Of a column that holds what fits the schema."""
    try:
        return _Forms(schema).of(schema, ()) or JSON_TEXT
    except _TooWide:
        return JSON_TEXT


class _TooWide(Exception):
    """The type would have more parts than a table should have columns."""


class _Forms:
    """Of the parts of a schema; None: JSON text. `above`: the references that led to a part, which
    must not come again."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._depth = self._parts = 0

    def of(self, schema: object, above: tuple[str, ...]) -> Form | None:
        """Raises _TooWide."""
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise _TooWide
        if not isinstance(schema, dict) or self._depth > _DEEPEST:
            return None
        self._depth += 1
        form = self._of(schema, above)
        self._depth -= 1
        return form

    def _of(self, schema: Schema, above: tuple[str, ...]) -> Form | None:
        if "$ref" in schema:
            return self._referred(schema, above)
        if "const" in schema or "enum" in schema:
            return _of_values(schema["enum"] if "enum" in schema else [schema["const"]])
        options = schema.get("anyOf", schema.get("oneOf"))
        if options is not None:
            return self._any_of(options, above)
        if "allOf" in schema:
            alone = len(schema["allOf"]) == 1 and not schema.keys() & _DECIDED_ELSEWHERE
            return self.of(schema["allOf"][0], above) if alone else None
        kinds = schema.get("type")
        if isinstance(kinds, list):
            return self._any_of([{**schema, "type": kind} for kind in kinds], above)
        if kinds == "object":
            return self._object(schema, above)
        if kinds == "array":
            return self._array(schema, above)
        return _SCALARS.get(str(kinds))

    def _referred(self, schema: Schema, above: tuple[str, ...]) -> Form | None:
        reference = str(schema["$ref"])
        if schema.keys() - _BESIDE_REFERENCE or reference in above or reference[:2] != "#/":
            return None
        target: Any = self._root
        for step in reference[2:].split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or name not in target:
                return None
            target = target[name]
        return self.of(target, (*above, reference))

    def _any_of(self, options: object, above: tuple[str, ...]) -> Form | None:
        """The form of all but null, where there is only one."""
        found = [
            self.of(option, above) for option in (options if isinstance(options, list) else [])
        ]
        return _joined(found)

    def _object(self, schema: Schema, above: tuple[str, ...]) -> Form | None:
        properties = schema.get("properties")
        is_closed = schema.get("additionalProperties") is False
        if not isinstance(properties, dict) or not properties or not is_closed:
            return None
        if "patternProperties" in schema:
            return None
        forms = {name: self.of(part, above) or JSON_TEXT for name, part in properties.items()}
        kind = pa.struct([pa.field(name, form.type) for name, form in forms.items()])
        return Form(kind, lambda value: {
            name: forms[name].convert(inner) for name, inner in value.items() if name in forms
        })  # fmt: skip

    def _array(self, schema: Schema, above: tuple[str, ...]) -> Form | None:
        if "prefixItems" in schema or isinstance(schema.get("items"), list):
            return None
        form = self.of(schema.get("items"), above) or JSON_TEXT
        return Form(pa.list_(form.type), lambda value: [form.convert(item) for item in value])


def _of_values(values: object) -> Form | None:
    """Of single values, all of one type but null."""
    names = {
        dict: "",
        list: "",
        type(None): "null",
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
    }
    listed = values if isinstance(values, list) else []
    if any(type(value) is int and not -(2**63) <= value < 2**63 for value in listed):
        return None
    return _joined([_SCALARS.get(names[type(value)]) for value in listed])


def _joined(forms: Sequence[Form | None]) -> Form | None:
    """The one form of all that are not null; such of objects and lists must be one and the same."""
    others = [form for form in forms if form is None or not pa.types.is_null(form.type)]
    if not others:
        return _NULL if forms else None
    first = others[0]
    if first is None or any(form is not first for form in others[1:]):
        return None
    if len(others) == len(forms):
        return first
    return Form(first.type, lambda value: None if value is None else first.convert(value))
