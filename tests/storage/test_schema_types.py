"""The type of a column of what fits a schema, and values in it."""

from __future__ import annotations

import json
import random
from typing import Any

import pyarrow as pa
import pytest

from pipeline.narrowed_schemas import narrowed
from pipeline.storage.schema_types import JSON_TEXT, form_of
from tests.tokens.test_grammar import draw_schema

CLOSED = {"additionalProperties": False}
N, F, S, B = pa.int64(), pa.float64(), pa.string(), pa.bool_()


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | CLOSED


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "integer"}, N),
        ({"type": "number"}, F),
        ({"type": ["string", "null"]}, S),
        ({"enum": ["a", "b", None]}, S),
        ({"enum": ["a", 1]}, S),  # as JSON text
        ({"const": True}, B),
        ({"const": 2**70}, S),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, F),
        ({"anyOf": [{"type": "number"}, {"type": "string"}]}, S),
        ({"type": "array", "items": {"type": "boolean"}}, pa.list_(B)),
        ({"type": "array"}, pa.list_(S)),
        ({"prefixItems": [{"type": "boolean"}], "type": "array"}, S),
        (object_of(a={"type": "integer"}), pa.struct({"a": N})),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, S),
        (object_of(a={"type": "object"}), pa.struct({"a": S})),
        ({"type": "object"}, S),
        ({}, S),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, N),
        ({"$ref": "#/$defs/x", "$defs": {}}, S),
        ({"allOf": [{"type": "integer"}]}, N),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, S),
        (object_of(next={"$ref": "#"}), pa.struct({"next": S})),
        ({"type": "null"}, pa.null()),
        ({"oneOf": "x", "type": {}}, S),
    ],
)
def test_the_type_is_as_exact_as_it_can_be(schema: dict[str, Any], kind: pa.DataType) -> None:
    assert form_of(schema).type == kind


def value_of(schema: dict[str, Any], draw: random.Random) -> Any:
    """Something that fits a schema of `draw_schema`."""
    if "anyOf" in schema:
        return value_of(draw.choice(schema["anyOf"]), draw)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema["type"]
    if kind == "object":
        names = [n for n in schema["properties"] if n in schema["required"] or draw.random() < 0.5]
        return {name: value_of(schema["properties"][name], draw) for name in names}
    if kind == "array":
        return [value_of(schema["items"], draw) for _ in range(schema["minItems"])]
    plain = {"string": "a\ud800", "integer": 7, "number": 3, "boolean": True, "null": None}
    return plain[kind]


@pytest.mark.parametrize("seed", range(200))
def test_every_value_that_fits_finds_room_in_its_column(seed: int) -> None:
    draw = random.Random(seed)
    schema = narrowed(draw_schema(draw))
    form = form_of(schema)
    values = [form.convert(value_of(schema, draw)) for _ in range(5)]
    column = pa.array(values, form.type)
    assert len(column) == 5
    if form is JSON_TEXT:
        assert all(isinstance(json.loads(text), object) for text in column.to_pylist())


def test_numbers_beyond_a_column_and_half_a_surrogate_pair() -> None:
    with pytest.raises(OverflowError):
        form_of({"type": "integer"}).convert(2**63)
    assert form_of({"type": "string"}).convert("a\ud800b") == "a?b"
    assert json.loads(JSON_TEXT.convert(["\ud800"])) == ["\ud800"]
