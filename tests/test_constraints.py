"""What an answer must be, as one text: every way to say it, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline import constraints
from pipeline.constraints import as_request, of_request, schema_of
from pipeline.narrowed_schemas import MOST_WHOLE, narrowed

OBJECT = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}


def test_the_order_of_properties_is_kept() -> None:
    text = constraints.of_schema(json.dumps(OBJECT))
    assert text == constraints.of_schema(OBJECT)
    found = schema_of(text)
    assert found is not None and list(found["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("response_format", {"type": "json_object"}, '{"json_schema":{"type":"object"}}'),
        ("response_format", '{"type": "json_object"}', '{"json_schema":{"type":"object"}}'),
        ("response_format", {"type": "text"}, None),
        ("response_format", {}, None),
        ("guided_json", {"type": "null"}, '{"json_schema":{"type":"null"}}'),
        ("guided_regex", "a+", '{"regex":"a+"}'),
        ("guided_grammar", 'start: "a"', '{"grammar":"start: \\"a\\""}'),
        ("guided_choice", ["a b", "c|"], '{"regex":"a b|c\\\\x{7C}"}'),
        ("structured_outputs", {"regex": "a+", "json": None}, '{"regex":"a+"}'),
        ("structured_outputs", {"json_object": True}, '{"json_schema":{"type":"object"}}'),
        ("structured_outputs", {"disable_any_whitespace": True}, None),
    ],
)
def test_each_field_of_a_request_is_read(name: str, value: object, same: str | None) -> None:
    assert of_request(name, value) == same


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("response_format", {"type": "xml"}, "json_object or json_schema"),
        ("response_format", {"type": "json_schema"}, "must be a JSON object, not null"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "no schema"),
        ("response_format", 3, "not a number"),
        ("guided_json", "[1]", "not a list"),
        ("guided_json", "{", "not valid JSON"),
        ("guided_json", {"uniqueItems": True}, "'uniqueItems'"),
        ("guided_json", {"properties": {"a": {"if": {}}}}, "'if'"),
        ("guided_json", {"items": {"$ref": "other.json"}}, r"\$ref"),
        ("guided_json", {"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ("guided_json", {"const": "x" * (1 << 20)}, "at most 1048576"),
        ("guided_regex", "a\ud800", "surrogate"),
        ("guided_regex", 3, "a text"),
        ("guided_choice", "ab", "list of texts"),
        ("guided_choice", ["a", 3], "a text"),
        ("guided_choice", ["a"] * 10_001, "at most 10000"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "must ask for one thing"),
        ("structured_outputs", {"whitespace_pattern": " "}, "whitespace_pattern"),
        ("structured_outputs", {"private": 1}, "a field that coppice does not know"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, value: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        of_request(name, value)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_depth_and_size_are_bounded_without_recursion() -> None:
    constraints.of_schema(nested(60))
    with pytest.raises(ValueError, match="64 deep"):
        constraints.of_schema(nested(5_000))
    with pytest.raises(ValueError, match="100000 values"):
        constraints.of_schema({"enum": list(range(100_001))})
    with pytest.raises(ValueError, match="not valid JSON|deep"):
        constraints.of_schema('{"items":' * 50_000 + "{}" + "}" * 50_000)


def test_keywords_within_values_are_not_keywords() -> None:
    constraints.of_schema({"const": {"if": 1}, "default": {"not": 2}, "x-mine": {"contains": 3}})
    constraints.of_schema({"properties": {"if": {"type": "string"}}})


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.of_schema(OBJECT), constraints.of_regex("a|b"),
        constraints.of_grammar('start: "x"'), constraints.of_choices(["a", "b"]),
    ],
)  # fmt: skip
def test_a_constraint_is_the_same_again_as_a_field_of_a_request(constraint: str) -> None:
    ((name, value),) = as_request(constraint).items()
    assert of_request(name, value) == constraint


def test_whole_numbers_get_bounds_and_objects_an_end() -> None:
    found = narrowed({"properties": {"a": {"type": ["integer", "null"]}, "b": {"properties": {}}}})
    assert found["additionalProperties"] is False
    assert found["properties"]["a"]["maximum"] == MOST_WHOLE == 2**63 - 1024
    assert "additionalProperties" not in found["properties"]["b"]  # it names none
    assert narrowed({"type": "integer", "minimum": 3}) == {
        "type": "integer", "minimum": 3, "maximum": MOST_WHOLE,
    }  # fmt: skip
    joined: dict[str, Any] = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert narrowed(joined) == joined
