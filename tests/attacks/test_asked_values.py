"""The column `parsed` under every kind of schema: what `json.loads` says, in bounded time."""

from __future__ import annotations

import json
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import constraints
from pipeline.audit.answer_judge import fits
from pipeline.audit.auditing import audit_run
from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.narrowed_schemas import MOST_WHOLE, narrowed
from pipeline.prompt_settings import TokenSettings
from pipeline.run import run_job
from pipeline.settings import AuditSettings
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.schema_types import JSON_TEXT, form_of
from pipeline.tokens.constraint_check import ConstraintChecker
from pipeline.tokens.grammar import Grammars
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.test_structured import DEMO, LABEL, PROMPTS, rewrite, settings_of, write_schema
from tests.tiny_job import answers, write_prompts

FULL = AuditSettings(audit_sample="100%", audit_arms=0)
INT, TEXT = {"type": "integer"}, {"type": "string", "maxLength": 6}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


KINDS: dict[str, dict[str, Any]] = {
    "integer at its borders": {"enum": [2**63 - 1, -MOST_WHOLE, 0]},
    "integer of 64 bits": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "integer with one wide bound": {"type": "integer", "minimum": -(10**25)},
    "number": {"type": "number", "minimum": -5, "maximum": 5},
    "numbers that floats cannot say": {"enum": [0.1, 1e308, 5e-324, -0.0]},
    "whole floats": {"enum": [1.0, 2.0]},
    "whole and other numbers": {"enum": [1, 1.0, 2.5]},
    "const of a float": {"const": 1.0},
    "integer as a float": {"type": "integer", "const": 1.0},
    "enum of all types": {"enum": [1, "1", True, None, 1.5, [1], {"a": 1}]},
    "enum of null": {"enum": [None]},
    "null": {"type": "null"},
    "nullable integer": {"type": ["integer", "null"], "minimum": 0, "maximum": 3},
    "nullable in anyOf": {"anyOf": [of(a=INT), {"type": "null"}]},
    "field of null": of(a={"type": "null"}, b=INT),
    "list of null": of(a={"type": "array", "items": {"type": "null"}, "maxItems": 2}),
    "list of a struct with null": {
        "type": "array", "maxItems": 2, "minItems": 1, "items": of(a={"type": "null"}),
    },
    "lists in lists": {
        "type": "array", "maxItems": 2,
        "items": {"type": "array", "maxItems": 2, "items": {"enum": ["a", None]}},
    },
    "list without a kind": {"type": "array", "maxItems": 2},
    "list of nothing": {"type": "array", "items": INT, "maxItems": 0},
    "no properties": {"type": "object", "properties": {}, "additionalProperties": False},
    "empty objects in a list": {
        "type": "array", "maxItems": 2,
        "items": {"type": "object", "properties": {}, "additionalProperties": False},
    },
    "optional properties": {"type": "object", "properties": {"a": INT, "b": TEXT}},
    "all optional in a list": {
        "type": "array", "minItems": 1, "maxItems": 3,
        "items": {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": ["x"]}}},
    },
    "required but not described": {
        "type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a", "b"],
    },
    "names of other letters": of(**{"größe": INT, "日本": {"enum": [1]}, "🍒": {"enum": ["x"]}}),
    "names with marks": of(**{"a.b": {"enum": [1]}, "a/b": {"enum": [2]}, "~": {"enum": [3]},
                              "a b": {"enum": [4]}, '"': {"enum": [5]}, "\\": {"enum": [6]}}),
    "an empty name": of(**{"": {"enum": [1]}, " ": {"enum": [2]}}),
    "names that end for C": of(**{"a\0b": {"enum": [1]}, "a\0c": {"enum": [2]}}),
    "names of lines": of(**{"a\nb": {"enum": [1]}, "a\tb": {"enum": [2]}}),
    "names alike but for case": of(a={"enum": [1]}, A={"enum": [2]}),
    "names of columns": of(id=INT, parsed={"enum": ["x"]}, row_index={"enum": [2]}),
    "reference": {"$ref": "#/$defs/a", "$defs": {"a": of(b={"$ref": "#/$defs/c"}), "c": INT}},
    "reference with a mark": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": of(x={"enum": [1]})}},
    "recursion": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "object", "properties": {
            "v": {"enum": [1]}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
        }, "required": ["v", "next"]}},
    },
    "two kinds of objects": {"anyOf": [of(a={"enum": [1]}), of(b={"enum": ["x"]})]},
    "put together": {"allOf": [of(a={"enum": [1]}), of(b={"enum": [2]})]},
    "free names": {"type": "object", "additionalProperties": INT, "maxProperties": 2},
    "patterns of names": {
        "type": "object", "patternProperties": {"^x[a-b]$": INT}, "additionalProperties": False,
        "maxProperties": 2,
    },
    "a tuple": {"type": "array", "prefixItems": [INT, TEXT], "items": False, "minItems": 2},
    "text of a form": {"type": "string", "format": "date"},
    "text of a pattern": {"type": "string", "pattern": "^[a-c]{2}\\d$"},
    "true alone": {"const": True},
    "anything of a few": {"type": ["boolean", "integer"], "minimum": 0, "maximum": 3},
}  # fmt: skip


@cache
def grammars() -> Grammars:
    return PromptTokenizer.load(str(DEMO), None, TokenSettings()).grammars


def spell(schema: dict[str, Any], seed: int) -> str | None:
    """An answer under the schema, of tokens at random; None: it found no end."""
    draw, found = random.Random(seed), grammars()
    matcher, said = found.matcher(constraints.of_schema(schema)), list[int]()
    while len(said) < 300 and not matcher.is_over:
        if matcher.may_end and draw.random() < 0.5:
            break
        bits = np.unpackbits(found.fill([matcher]).view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        short = [token for token in allowed if token != found._eos_id]
        if not short:
            break
        said.append(draw.choice(short))
        assert matcher.accept(said[-1]) is None
    if not (matcher.is_over or matcher.may_end):
        return None
    tokenizer = PromptTokenizer.load(str(DEMO), None, TokenSettings())
    return tokenizer.decode_batch([said])[0]


def same(parsed: Any, value: Any, kind: pa.DataType) -> bool:
    """Whether a cell of a column says what JSON said, in type and value."""
    if pa.types.is_struct(kind):
        if value is None or parsed is None:
            return value is parsed
        inner = (same(parsed[f.name], value.get(f.name), f.type) for f in kind)
        return set(value) <= {f.name for f in kind} and all(inner)
    if pa.types.is_list(kind):
        if value is None or parsed is None:
            return value is parsed
        return len(parsed) == len(value) and all(
            same(a, b, kind.value_type) for a, b in zip(parsed, value, strict=True)
        )
    if pa.types.is_string(kind) and isinstance(parsed, str) and parsed != value:
        return exact(json.loads(parsed), value)
    return exact(parsed, value) or (isinstance(parsed, float) and parsed == value)


def exact(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_parsed_is_what_json_says_in_type_and_value(name: str, tmp_path: Path) -> None:
    schema = KINDS[name]
    texts = [text for seed in range(12) if (text := spell(schema, seed)) is not None]
    assert texts, "no answer came to an end"
    form = form_of(narrowed(json.loads(json.dumps(schema))))
    values = [json.loads(text) for text in texts]
    table = pa.table({"parsed": pa.array([form.convert(v) for v in values], form.type)})
    pq.write_table(table, tmp_path / "x.parquet")
    read = pl.read_parquet(tmp_path / "x.parquet")["parsed"].to_list()
    again = pq.read_table(tmp_path / "x.parquet")["parsed"].to_pylist()
    for text, value, cell, other in zip(texts, values, read, again, strict=True):
        assert same(other, value, form.type), (text, other)
        assert same(cell, value, form.type), (text, cell)
        assert fits(text, constraints.of_schema(schema)), text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "minimum": -1e308, "maximum": 1e308},
        {"type": "integer", "minimum": 2**63}, {"type": "integer", "multipleOf": 10**12},
        {"type": "number", "minimum": 10**320},
    ],
)  # fmt: skip
def test_numbers_that_no_compiler_takes_are_refused_in_a_sentence(schema: dict[str, Any]) -> None:
    checked = ConstraintChecker(grammars).check([constraints.of_schema(schema)])
    (found,) = checked.values()
    assert found.reason is not None and found.reason.startswith(("answers cannot", "what the"))


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63), 10**30])
def test_numbers_beyond_64_bits_are_none_that_an_answer_is_held_to(number: int) -> None:
    """The compiler would write 9223372036854776000 for the first, and the third one ends it."""
    for schema in ({"const": number}, {"enum": [1, {"a": [number]}]}, of(a={"const": number})):
        with pytest.raises(ValueError, match="beyond 64 bits"):
            constraints.of_schema(schema)


def test_a_whole_number_that_a_float_would_change_has_no_value() -> None:
    form = form_of({"type": "number"})
    assert form.convert(3) == 3.0 and form.convert(2**53) == 2.0**53
    for number in (2**53 + 1, 3187336027813411298945968, 10**400):
        with pytest.raises(OverflowError):
            form.convert(number)


def referring(depth: int, width: int) -> dict[str, Any]:
    """Objects of `width` fields, each of which is the next one."""
    parts = {f"d{i}": of(**{f"f{j}": {"$ref": f"#/$defs/d{i + 1}"} for j in range(width)})
             for i in range(depth)}  # fmt: skip
    return {"$ref": "#/$defs/d0", "$defs": parts | {f"d{depth}": {"enum": [1, 2]}}}


@pytest.mark.parametrize(("depth", "width"), [(40, 2), (1_000, 1), (3, 60), (12, 3), (90, 1)])
def test_a_type_is_neither_deeper_nor_wider_than_readers_take(depth: int, width: int) -> None:
    begin = time.monotonic()
    form = form_of(narrowed(referring(depth, width)))
    assert time.monotonic() - begin < 2
    table = pa.table({"parsed": pa.array([None], form.type)})
    assert pl.from_arrow(table).height == 1  # type: ignore[union-attr]


def test_alternatives_that_refer_without_end_are_json_text() -> None:
    parts = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    assert form_of({"$ref": "#/$defs/d0", "$defs": parts | {"d40": INT}}) is JSON_TEXT


@pytest.mark.parametrize(("depth", "width"), [(40, 2), (90, 1), (2, 70)])
def test_a_job_of_a_hostile_schema_ends(tmp_path: Path, depth: int, width: int) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2])
    schema = write_schema(tmp_path / "s.json", referring(depth, width))
    begin = time.monotonic()
    try:
        run_job(str(prompts), tmp_path / "out", settings_of(json_schema=schema, max_new_tokens=64))
    except UsageError as error:
        assert "--json-schema" in str(error)
    else:
        assert answers(tmp_path / "out")["status"].to_list() == ["ok", "ok"]
    assert time.monotonic() - begin < 60


AUDITED: dict[str, dict[str, Any]] = {
    "lists": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 1}},
    "an answer that is null": {"enum": [None]},
    "nullable": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    "parts of a hundred": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1},
    "an object with null": of(a={"type": "null"}, b={"enum": [1]}),
    "whole floats": of(a={"type": "integer", "const": 1.0}),
    "a pattern that python takes for ever": {
        "type": "string", "pattern": "^((a+)+b|[ac]{30,40})$",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(AUDITED))
def test_an_audit_passes_what_is_right(tmp_path: Path, name: str) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3])
    schema = write_schema(tmp_path / "s.json", AUDITED[name])
    settings = settings_of(json_schema=schema, max_new_tokens=400, temperature=1.0)
    run_job(str(prompts), tmp_path / "out", settings)
    begin = time.monotonic()
    verdict = audit_run(Location(tmp_path / "out"), FULL)
    assert verdict.passed
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_a_token_that_must_follow_and_is_ruled_out_is_the_rows_error(
    tmp_path: Path, engine: str
) -> None:
    """What must follow is not decoded, but a row that forbids it is not left out for that."""
    asked = [{"bad_words": ["label"]}, {"bad_words": ["zzz"]}, {"allowed_token_ids": [5, 6]}, {}]
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:4],
                            sampling_params=[json.dumps(said) for said in asked])  # fmt: skip
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL, engine=engine))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["error", "ok", "error", "ok"]
    assert rows["error_type"].to_list()[0] == rows["error_type"].to_list()[2] == "ConstraintFault"
    assert rows["parsed"].to_list()[1] is not None
    if engine == "prefix":
        assert audit_run(Location(tmp_path / "out"), FULL).passed


@pytest.mark.parametrize(
    "flat",
    [
        {"n": 3, "temperature": 1.0}, {"n": 2, "temperature": 1.0, "explode": True},
        {"logprobs": 2, "generation_options": ["min_tokens=30"], "stop": ["9"]},
    ],
)  # fmt: skip
def test_an_audit_plants_its_faults_whatever_rows_ask_for(
    tmp_path: Path, flat: dict[str, Any]
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3])
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL, **flat))
    verdict = audit_run(
        Location(tmp_path / "out"), AuditSettings(audit_sample="100%", audit_arms=2)
    )
    assert verdict.passed


@pytest.mark.fault(
    "answers of a form",
    injected="the value of a committed `parsed` is another one, or none, or none where one is",
    outcome="the audit calls the row corrupt",
)
@pytest.mark.parametrize("change", ["value", "gone"])
def test_an_audit_finds_a_value_that_the_answer_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3])
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL))

    def spoil(row: dict[str, Any]) -> None:
        if change == "gone":
            row["parsed"] = None
        else:
            row["parsed"]["score"] += 1

    rewrite(tmp_path / "out", spoil)
    monkeypatch.setattr(RunDirectory, "check_complete", lambda self: None)
    assert not audit_run(Location(tmp_path / "out"), FULL).passed


def test_columns_of_an_earlier_run_are_no_values_of_this_one(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3], parsed=["a", "b", "c"],
                            forced_tokens=[1, 2, 3])  # fmt: skip
    run_job(str(prompts), tmp_path / "plain", settings_of(max_new_tokens=4))
    assert answers(tmp_path / "plain")["parsed"].to_list() == ["a", "b", "c"]
    assert audit_run(Location(tmp_path / "plain"), FULL).passed
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL))
    rows = answers(tmp_path / "out")
    assert rows["input_parsed"].to_list() == ["a", "b", "c"]
    assert rows["parsed"].to_list() == [json.loads(text) for text in rows["generated_text"]]
    assert audit_run(Location(tmp_path / "out"), FULL).passed


def test_a_row_with_a_bad_schema_takes_no_type_from_the_others(tmp_path: Path) -> None:
    own = [None, json.dumps({"guided_json": {"type": "object", "minLenght": 1}}),
           json.dumps({"guided_regex": "["})]  # fmt: skip
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3], sampling_params=own)
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok", "error", "error"]
    assert rows.schema["parsed"] == pl.Struct({"label": pl.String, "score": pl.Int64})
