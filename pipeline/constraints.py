"""What an answer must be: a JSON schema, a regular expression or a grammar, as one canonical text.

```
 --json-schema FILE   --regex R   --grammar FILE   --json-schema-column C      of a job
 response_format      structured_outputs      guided_json, guided_regex, ...   of a row
        └──────────► {"json_schema": ...} | {"regex": ...} | {"grammar": ...} ◄──────────┘
```

The order of a schema's properties is that of the answer's, so it is kept. Whatever a schema says
that nobody would enforce is refused by name: an ignored keyword is an answer of another kind. Knows
nothing of how a grammar is compiled (`tokens/grammar.py`); quotes nothing of a row but keywords.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

MOST_CHARACTERS: Final = 1 << 20
"""Of a constraint, as text."""
_MOST_DEPTH: Final = 64
_MOST_PARTS: Final = 100_000  # values within a schema
_MOST_CHOICES: Final = 10_000

_CHECKED: Final = frozenset(
    (
        "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum",
        "exclusiveMaximum", "exclusiveMinimum", "format", "items", "maxItems", "maxLength",
        "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum",
        "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
        "required", "type",
    )
)  # fmt: skip
"""Keywords that an answer is held to."""
_BESIDE: Final = frozenset(
    (
        "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType",
        "default", "definitions", "deprecated", "description", "discriminator", "example",
        "examples", "id", "readOnly", "title", "writeOnly",
    )
)  # fmt: skip
"""Keywords that say nothing about which answers are right."""
_MAPS: Final = ("$defs", "definitions", "patternProperties", "properties")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE: Final = ("additionalItems", "additionalProperties", "items")
Constraint = dict[str, Any]


def of_schema(schema: object) -> str:
    """A JSON schema, as value or as JSON text. Raises ValueError."""
    schema = _object(schema, "the schema")
    _check_schema(schema)
    return _canonical("json_schema", schema)


def of_regex(text: object) -> str:
    """A regular expression that the whole answer matches. Raises ValueError."""
    return _canonical("regex", _text(text, "the regular expression"))


def of_grammar(text: object) -> str:
    """A grammar in Lark's notation, whose rule `start` is the whole answer. Raises ValueError."""
    return _canonical("grammar", _text(text, "the grammar"))


def of_choices(choices: object) -> str:
    """One of these texts, as it is. Raises ValueError."""
    if not isinstance(choices, list | tuple) or not choices:
        raise ValueError("the choices must be a list of texts")
    if len(choices) > _MOST_CHOICES:
        raise ValueError(f"there are {len(choices)} choices, and at most {_MOST_CHOICES} are taken")
    return _canonical("regex", "|".join(_escaped(_text(c, "a choice")) for c in choices))


def _escaped(text: str) -> str:
    """As a regular expression that matches it alone."""
    plain = (c.isalnum() or c in " _" for c in text)
    return "".join(c if p else f"\\x{{{ord(c):X}}}" for c, p in zip(text, plain, strict=True))


def of_request(name: str, value: object) -> str | None:
    """What a field of a request asks for; None: nothing. Raises ValueError, which names it."""
    if value == "" or (name in _EMPTY and value == _EMPTY[name]):
        return None
    try:
        return _READERS[name](value)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if name in said else f"{name}: {said}") from None


def as_request(constraint: str) -> dict[str, Any]:
    """The field of a request that asks for it: OpenAI's where there is one, else vLLM's."""
    ((kind, value),) = json.loads(constraint).items()
    if kind != "json_schema":
        return {"structured_outputs": {kind: value}}
    named = {"name": "answer", "schema": value}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def schema_of(constraint: str) -> Constraint | None:
    """The JSON schema of a constraint that is one."""
    if not constraint.startswith('{"json_schema":'):
        return None
    schema: Constraint = json.loads(constraint)["json_schema"]
    return schema


def _of_response_format(value: object) -> str | None:
    """OpenAI's."""
    said = _fields(value, "response_format")
    kind = said.pop("type", None) if said else "text"
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError("response_format must be of the type text, json_object or json_schema")
    inner = said.pop("json_schema", None) if kind == "json_schema" else {"schema": _OBJECT}
    inner = _fields(inner, "response_format.json_schema")
    _refuse_others(said, f"response_format of the type {kind}")
    if "schema" not in inner:
        raise ValueError("response_format.json_schema has no schema")
    _refuse_others(inner.keys() - _OF_SCHEMA, "response_format.json_schema")
    return None if kind == "text" else of_schema(inner["schema"])


_OBJECT: Final = {"type": "object"}
_OF_SCHEMA: Final = {"schema", "name", "description", "strict"}  # which it is always
_KNOWN: Final = (
    "schema", "json_schema", "regex", "choice", "grammar", "pattern", "structural_tag",
    "whitespace_pattern", "disable_additional_properties",
)  # fmt: skip


def _refuse_others(names: Iterable[str], what: str) -> None:
    """Raises ValueError where a field is there that would be left out; names those of others."""
    listed = sorted(names, key=lambda name: name not in _KNOWN)
    if listed:
        is_known = listed[0] in _KNOWN
        field = f"the field {listed[0]!r}" if is_known else "a field that coppice does not know"
        raise ValueError(f"{what} has {field}; leave it out")


def _of_structured_outputs(value: object) -> str | None:
    """vLLM's."""
    said = _fields(value, "structured_outputs")
    for name in _FLAGS & said.keys():
        if not isinstance(said[name], bool):
            raise ValueError(f"structured_outputs.{name} must be true or false")
        if name in _ALWAYS or not said[name]:
            del said[name]
    _refuse_others(said.keys() - _STRUCTURED.keys(), "structured_outputs")
    if not said:
        return None
    if len(said) > 1:
        raise ValueError(f"structured_outputs must ask for one thing of {', '.join(_STRUCTURED)}")
    ((name, asked),) = said.items()
    return _STRUCTURED[name](asked)


_ALWAYS: Final = {"disable_any_whitespace", "disable_fallback"}
_FLAGS: Final = {"json_object", "disable_additional_properties"} | _ALWAYS
_STRUCTURED: Final[Mapping[str, Callable[[object], str]]] = {
    "json": of_schema,
    "regex": of_regex,
    "choice": of_choices,
    "grammar": of_grammar,
    "json_object": lambda asked: of_schema(_OBJECT),
}
_READERS: Final[Mapping[str, Callable[[object], str | None]]] = {
    "response_format": _of_response_format,
    "structured_outputs": _of_structured_outputs,
    "guided_json": of_schema,
    "guided_regex": of_regex,
    "guided_choice": of_choices,
    "guided_grammar": of_grammar,
}
_EMPTY: Final[Constraint] = {"guided_json": {}, "guided_choice": []}  # the others know it
REQUEST_FIELDS: Final = tuple(_READERS)
"""Fields of a request that ask for an answer of some form."""


def _check_schema(schema: Constraint) -> None:
    """Raises ValueError for what is too large, or a keyword that nobody would hold an answer to."""
    parts = 0
    todo: list[tuple[object, int]] = [(schema, 0)]
    while todo:
        value, depth = todo.pop()
        parts += 1
        if depth > _MOST_DEPTH:
            raise ValueError(
                f"the schema is nested more than {_MOST_DEPTH} deep; flatten it by $ref"
            )
        if parts > _MOST_PARTS:
            raise ValueError(f"the schema holds more than {_MOST_PARTS} values; make it smaller")
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            todo += [(part, depth + 1) for part in value]
    for part in subschemas(schema):
        unknown = [k for k in part if k not in _CHECKED and k not in _BESIDE]
        bad = [keyword for keyword in map(str, unknown) if not keyword.startswith("x-")]
        if bad:
            raise ValueError(
                f"the schema has the keyword {bad[0][:40]!r}, which answers cannot be held to; "
                "leave it out"
            )
        if any(_is_beyond(value) for value in _values_in([part.get("enum"), part.get("const")])):
            raise ValueError(
                "the schema has an enum or const with a number beyond 64 bits; make it a text"
            )
        reference = part.get("$ref", "#")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise ValueError("the schema has a $ref to another document; bring that into $defs")
        if "x-guidance" in part:
            raise ValueError("the schema has the keyword 'x-guidance', which is not for users")


def _values_in(value: object) -> Iterator[object]:
    todo = [value]
    while todo:
        part = todo.pop()
        yield part
        inner = list(part.values()) if isinstance(part, dict) else part
        todo += inner if isinstance(inner, list) else ()


def _is_beyond(value: object) -> bool:
    return isinstance(value, int) and not -(2**63) < value < 2**63


def subschemas(schema: Constraint) -> Iterator[Constraint]:
    """The schema and all within it that are objects."""
    todo: list[object] = [schema]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in _MAPS:
            inner = part.get(name)
            todo += inner.values() if isinstance(inner, dict) else ()
        for name in (*_LISTS, *_SINGLE):
            inner = part.get(name)
            todo += inner if isinstance(inner, list) else [inner]


def _canonical(kind: str, value: object) -> str:
    try:
        text = json.dumps({kind: value}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("it holds NaN, half a surrogate pair, or what is no JSON") from None
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MOST_CHARACTERS} are taken")
    return text


def _object(value: object, name: str) -> Constraint:
    if isinstance(value, str):
        value = _read_json(value, name)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a JSON object, not {_kind(value)}")
    return value


def _fields(value: object, name: str) -> Constraint:
    return {field: said for field, said in _object(value, name).items() if said is not None}


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} holds half a surrogate pair, which is not text")
    return value


def _read_json(text: str, name: str) -> object:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters; at most {MOST_CHARACTERS} are taken")
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON") from None
    return value


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", dict: "one with other names"}
    return "null" if value is None else names.get(type(value), "a number")
