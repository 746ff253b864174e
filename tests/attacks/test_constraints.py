"""Hostile and hopeless constraints, of flags and of rows: refused, or held to; never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.run import run_job
from tests.test_structured import LABEL, PROMPTS, settings_of
from tests.tiny_job import answers, write_prompts

HOSTILE: dict[str, Any] = {
    "alternatives": {"guided_choice": [f"w{i}" for i in range(9_000)]},
    "many alternatives": {"guided_regex": "|".join(f"w{i}" for i in range(100_000))},
    "exponential": {"guided_regex": "((((a{1,500}){1,500}){1,500}){1,500}b)*"},
    "deep brackets": {"guided_regex": "(" * 60_000 + "a" + ")" * 60_000},
    "deep grammar": {"guided_grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "endless rule": {"guided_grammar": 'start: start "a"'},
    "endless reference": {"guided_json": {"$ref": "#"}},
    "references in a circle": {
        "guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},
                                                       "b": {"$ref": "#/$defs/a"}}}
    },
    "endless object": {
        "guided_json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    },
    "long": {"guided_json": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
    "huge number": {"guided_json": {"type": "integer", "minimum": 10**400}},
    "wide": {"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(9_000)}}},
    "nothing": {"guided_json": {"enum": []}},
    "never": {"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}},
    "pattern": {"guided_json": {"type": "string", "pattern": "(a+)+(?=b)"}},
    "surrogate": {"guided_json": {"const": "\ud800"}},
    "nul": {"guided_json": {"const": "a\u0000b"}},
    "control token": {"guided_json": {"const": "<|im_end|>"}},
    "not a regex": {"guided_regex": "[z-a]"},
    "imports": {"guided_grammar": 'start: x\n%import common.WORD -> x'},
    "keyword of another kind": {"guided_json": {"type": "object", "propertyNames": {}}},
}  # fmt: skip
CRUEL = {
    "deep brackets", "deep grammar", "endless rule", "endless reference", "references in a circle",
    "endless object", "nothing", "never", "pattern", "not a regex", "keyword of another kind",
}  # fmt: skip
"""Those that must be refused; of the others an answer may come, or be cut."""


@pytest.mark.fault(
    "answers of a form",
    injected="hostile, endless, contradictory and unknown schemas and grammars in rows",
    outcome="each is refused with its row, or held to; in bounded time; the rows beside it run",
)
def test_hostile_constraints_of_rows_fail_their_rows_alone(tmp_path: Path) -> None:
    asked = [{"guided_json": LABEL}, *HOSTILE.values(), {"guided_json": LABEL}]
    texts = [json.dumps(said) for said in asked]
    prompts = write_prompts(tmp_path / "p.parquet", [PROMPTS[i % 18] for i in range(len(asked))],
                            sampling_params=texts)  # fmt: skip
    run_job(str(prompts), tmp_path / "out", settings_of(max_new_tokens=24))
    rows = answers(tmp_path / "out").to_dicts()
    assert rows[0]["status"] == rows[-1]["status"] == "ok"
    for name, row in zip(HOSTILE, rows[1:-1], strict=True):
        if row["status"] == "error":
            assert row["error_type"] in ("BadConstraint", "BadSamplingParams"), (name, row)
            assert len(row["error_message"]) < 300, name
        else:
            assert name not in CRUEL, (name, row)
            assert row["finish_reason"] in ("stop", "length")
            if row["finish_reason"] == "stop" and "guided_json" in HOSTILE[name]:
                assert json.loads(row["parsed"]) == json.loads(row["generated_text"])
    said = {name: row["generated_text"] for name, row in zip(HOSTILE, rows[1:-1], strict=True)}
    assert said["nul"] == json.dumps("a\u0000b")
    if said["control token"] is not None:
        assert said["control token"] == '"<|im_end|>"'


@pytest.mark.parametrize("name", sorted(CRUEL))
def test_a_hostile_constraint_of_the_job_is_refused_before_the_model_loads(
    tmp_path: Path, name: str
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2])
    ((field, value),) = HOSTILE[name].items()
    flag = {"guided_json": "json_schema", "guided_regex": "regex", "guided_grammar": "grammar"}

    def never(settings: object) -> Any:
        raise AssertionError("the model is loaded")

    with pytest.raises(UsageError) as refused:
        run_job(str(prompts), tmp_path / "out", settings_of(**{flag[field]: value}),
                make_engine=never)  # fmt: skip
    assert len(str(refused.value)) < 1500


def test_contradictory_fields_of_a_row_are_named(tmp_path: Path) -> None:
    asked = [
        {"guided_regex": "a{40}", "max_new_tokens": 3},
        {"guided_regex": "a+", "stop": "aa", "max_new_tokens": 9},
        {"guided_json": LABEL, "ignore_eos": True},
        {"guided_regex": "a*", "min_new_tokens": 4, "max_new_tokens": 9},
        {"thinking_budget": 3},
        {"thinking_budget": -1},
        {"thinking_budget": "x"},
    ]
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:7],
                            sampling_params=[json.dumps(said) for said in asked])  # fmt: skip
    run_job(str(prompts), tmp_path / "out", settings_of())
    rows = answers(tmp_path / "out").to_dicts()
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["error", "ok", "error"]  # -1: none
    assert rows[0]["finish_reason"] == "length" and set(rows[0]["generated_text"]) == {"a"}
    assert rows[1]["finish_reason"] in ("stop", "length") and "aa" not in rows[1]["generated_text"]
    assert rows[2]["finish_reason"] == "stop" and json.loads(rows[2]["generated_text"])
    assert rows[3]["completion_tokens"] >= 4 and set(rows[3]["generated_text"]) <= {"a"}
    assert all("thinking_budget" in row["error_message"] for row in (rows[4], rows[6]))


def test_a_tokenizer_without_an_end_and_a_tiny_vocabulary_can_fail_a_row(tmp_path: Path) -> None:
    """A model of single letters cannot say a bracket: the row is refused, and says so."""
    from tests.tiny_job import write_model

    model = write_model(tmp_path / "model")
    said = [json.dumps({"guided_json": LABEL}), json.dumps({"guided_regex": "yes|no"})]
    prompts = write_prompts(tmp_path / "p.parquet", ["hm", "so"], sampling_params=said)
    run_job(str(prompts), tmp_path / "out", settings_of(model=str(model)))
    rows = answers(tmp_path / "out").to_dicts()
    assert rows[0]["error_type"] == "BadConstraint"
    assert rows[1]["generated_text"] in ("yes", "no")
