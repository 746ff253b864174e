"""Constraints as masks and forced tokens of real tokenizers; what cannot be kept is refused."""

from __future__ import annotations

import json
import pickle
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from pipeline import constraints
from pipeline.narrowed_schemas import narrowed
from pipeline.prompt_settings import TokenSettings
from pipeline.tokens import constraint_check
from pipeline.tokens.constraint_check import ConstraintChecker
from pipeline.tokens.grammar import Grammars
from pipeline.tokens.loading import load_tokenizer
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tiny_job import write_tokenizer

DEMO = str(Path(__file__).resolve().parents[2] / "data" / "demo_model")
LABEL = {
    "type": "object",
    "properties": {"label": {"enum": ["good", "bad"]}, "score": {"type": "integer"}},
    "required": ["label", "score"],
}


@cache
def demo() -> PromptTokenizer:
    return PromptTokenizer.load(DEMO, None, TokenSettings())


def walk(grammars: Grammars, constraint: str, draw: random.Random, most: int = 300) -> list[int]:
    """Random tokens among those that are allowed; ends where it may, sometimes."""
    matcher, said = grammars.matcher(constraint), list[int]()
    while not matcher.is_over and len(said) < most:
        if matcher.may_end and draw.random() < 0.5:
            return said
        bits = np.unpackbits(grammars.fill([matcher])[0].view(np.uint8), bitorder="little")
        allowed = [t for t in np.flatnonzero(bits).tolist() if t != 0]
        assert allowed
        said.append(draw.choice(allowed))
        assert matcher.accept(said[-1]) is None
    assert matcher.may_end or len(said) == most
    return said


def draw_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "array", "object", "anyOf"]
    kind = draw.choice(kinds if depth < 3 else kinds[:6])
    if kind == "string":
        return draw.choice([
            {"type": "string", "maxLength": 6}, {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "minLength": 1, "maxLength": 3},
        ])  # fmt: skip
    if kind == "integer":
        return draw.choice([{"type": "integer"}, {"type": "integer", "minimum": 0, "maximum": 99}])
    if kind == "enum":
        return {"enum": draw.sample(["a", "b", 'q"q', "long value", 3, True, None, "ü"], 3)}
    if kind == "array":
        low = draw.randrange(3)
        return {
            "type": "array", "items": draw_schema(draw, depth + 1), "minItems": low,
            "maxItems": low + draw.randrange(1, 3),
        }  # fmt: skip
    if kind == "object":
        names = draw.sample(["label", "x", "name", "due_date", "tags"], draw.randrange(1, 4))
        return {
            "type": "object", "properties": {n: draw_schema(draw, depth + 1) for n in names},
            "required": draw.sample(names, draw.randrange(len(names) + 1)),
            "additionalProperties": False,
        }  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [draw_schema(draw, depth + 1) for _ in range(2)]}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_a_model_says_fits_a_random_schema(seed: int) -> None:
    draw = random.Random(seed)
    schema = draw_schema(draw)
    constraint = constraints.of_schema(schema)
    for _ in range(4):
        said = walk(demo().grammars, constraint, draw)
        text = demo().decode_batch([said])[0]
        if len(said) < 300:
            value = json.loads(text)
            Draft202012Validator(schema).validate(value)
            Draft202012Validator(narrowed(schema)).validate(value)


def test_forced_tokens_are_those_of_the_text_and_json_is_compact() -> None:
    grammars = demo().grammars
    opening = grammars.opening(constraints.of_schema(LABEL))
    assert demo().decode_batch([opening])[0] == '{"label":"'
    matcher = grammars.matcher(constraints.of_schema(LABEL))
    for token_id in opening:
        assert matcher.accept(token_id) is None
    assert matcher.forced() == [] and not matcher.may_end
    bits = np.unpackbits(grammars.fill([matcher])[0].view(np.uint8), bitorder="little")
    first = {demo().decode_batch([[t]])[0] for t in np.flatnonzero(bits).tolist()}
    assert {"g", "b"} <= first and all("good".startswith(t) or "bad".startswith(t) for t in first)


def test_what_is_forced_is_the_same_run_whoever_says_it_one_by_one() -> None:
    grammars, constraint = demo().grammars, constraints.of_schema({"const": {"a": "some words"}})
    whole = grammars.matcher(constraint).forced()
    matcher = grammars.matcher(constraint)
    for place, token_id in enumerate(whole):
        mask = grammars.fill([matcher])[0]
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == [token_id]
        assert matcher.forced() == whole[place:]
        assert matcher.accept(token_id) is None
    assert matcher.is_over
    assert grammars.opening(constraint) == tuple(whole[:-1])


def test_a_wrong_token_is_told_and_the_matcher_never_recovers() -> None:
    matcher = demo().grammars.matcher(constraints.of_regex("[ab]+"))
    (wrong,) = demo().encode_batch(["x"]).flat.tolist()
    assert matcher.accept(wrong) is not None
    assert not matcher.is_over
    assert not demo().grammars.fill([matcher]).any()


def test_grammars_travel_to_another_process() -> None:
    there = pickle.loads(pickle.dumps(demo().grammars))
    constraint = constraints.of_schema(LABEL)
    assert there.opening(constraint) == demo().grammars.opening(constraint)


def test_a_tokenizer_of_another_kind_is_read_token_by_token(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model")
    tokenizer = PromptTokenizer(load_tokenizer(str(folder), None), TokenSettings())
    constraint = constraints.of_regex("hello (world|there)")
    opening = tokenizer.grammars.opening(constraint)
    assert tokenizer.decode_batch([opening])[0] == "hello "
    said = walk(tokenizer.grammars, constraint, random.Random(1))
    assert tokenizer.decode_batch([said])[0] in ("hello world", "hello there")


def test_choices_are_said_as_they_are() -> None:
    constraint = constraints.of_choices(["yes", 'no "never"', "\\d+"])
    draw = random.Random(0)
    said = {demo().decode_batch([walk(demo().grammars, constraint, draw)])[0] for _ in range(40)}
    assert said == {"yes", 'no "never"', "\\d+"}


def check(*asked: str) -> list[constraint_check.Checked]:
    checker = ConstraintChecker(lambda: demo().grammars)
    found = checker.check(asked)
    return [found[one] for one in asked]


def raw(kind: str, value: object) -> str:
    return json.dumps({kind: value}, separators=(",", ":"))


def test_what_cannot_be_kept_is_refused_with_its_keyword_and_the_rest_is_kept() -> None:
    bad = {
        raw("json_schema", {"type": "string", "format": "zzz"}): "'format'",
        raw("json_schema", {"type": "string", "pattern": "(?=a)b"}): "schema",
        raw("json_schema", {"type": 5}): "'type'",
        raw("json_schema", {"type": "string", "minLength": "a"}): "'minLength'",
        raw("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}): "'oneOf'",
        raw("json_schema", {"$ref": "#"}): "schema",
        raw("json_schema", {"enum": []}): "schema",
        raw("regex", "(a"): "regular expression",
        raw("regex", "()"): "regular expression",
        raw("grammar", 'start: "a" b'): "grammar",
        raw("grammar", 'start: a\na: a "x"'): "grammar",
    }
    good = raw("json_schema", LABEL)
    *found, kept = check(*bad, good)
    for (asked, named), checked in zip(bad.items(), found, strict=True):
        assert checked.reason is not None, asked
        assert named in checked.reason, checked
        assert "zzz" not in checked.reason and "(?=" not in checked.reason
    assert kept.reason is None and kept.opening


def test_recursion_that_ends_is_kept() -> None:
    tree = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["next"],
    }
    (checked,) = check(constraints.of_schema(tree))
    assert demo().decode_batch([checked.opening])[0] == '{"next":'


@pytest.mark.parametrize(
    "asked",
    [
        raw("json_schema", {"enum": [f"v{i}" for i in range(60_000)]}),
        raw("regex", "((((a{1,500}){1,500}){1,500}){1,500}b)*"),
        raw("regex", "(" * 50_000 + "a" + ")" * 50_000),
        raw("grammar", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000),
        raw("grammar", "start: " + " | ".join(f'"w{i}"' for i in range(80_000))),
        raw("json_schema", {"type": "array", "minItems": 10**6, "maxItems": 10**7}),
    ],
    ids=["enum", "exponential", "deep regex", "deep grammar", "alternatives", "long array"],
)
def test_a_hostile_constraint_ends_in_bounded_time(asked: str) -> None:
    """Refused or kept, the process lives and the next one is answered."""
    hostile, kept = check(asked, raw("json_schema", LABEL))
    assert hostile.reason is not None or hostile.opening is not None
    assert kept.reason is None


def test_whether_a_token_may_follow_is_what_its_bit_says() -> None:
    """Also of ids that only the model knows, which harm nothing."""
    grammars, draw = demo().grammars, random.Random(1)
    for constraint in (constraints.of_schema(LABEL), constraints.of_regex("[ab]{2,5}c?")):
        matcher = grammars.matcher(constraint)
        while not matcher.is_over:
            mask = grammars.fill([matcher])[0]
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            tried = draw.sample(range(grammars.vocabulary_size), 40)
            for token_id in {*tried, *allowed[:40].tolist()}:
                is_end = token_id == demo().grammars._eos_id
                assert is_end or matcher.allows(token_id) == (token_id in allowed), token_id
            assert not matcher.allows(grammars.vocabulary_size)
            assert not matcher.allows(grammars.vocabulary_size + 10_000)
            others = [t for t in allowed.tolist() if t != grammars._eos_id]
            assert matcher.accept(draw.choice(others)) is None


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(yes|no", "unclosed group"), ("a{5,2}", "invalid repetition"), ("(?=a)b", "look-around")],
)
def test_a_bad_expression_is_told_by_what_is_wrong_with_it(pattern: str, said: str) -> None:
    """Seen red: `at 1(8): invalid regex "(yes|no" (in regex): regex parse error:`, and no more."""
    (checked,) = check(raw("regex", pattern))
    assert checked.detail.startswith(said)
