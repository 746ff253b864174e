"""Answers of a form, from the command to the output: schemas, openings, the column `parsed`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from typer.testing import CliRunner

import kvcoppice
from pipeline.audit.auditing import audit_run
from pipeline.cli.app import app
from pipeline.errors import InputError, Interrupted, UsageError
from pipeline.location import Location
from pipeline.run import plan_job, run_job
from pipeline.settings import AuditSettings, JobSettings
from pipeline.storage.run_directory import RunDirectory
from tests.tiny_job import answers, on, write_prompts

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo_model"
LABEL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad", "unsure"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["label", "score"],
}
PROMPTS = [f"Say what you think of plum {i % 7}, please: {'word ' * (i % 3)}" for i in range(18)]


def settings_of(**flat: Any) -> JobSettings:
    usual = {"dtype": "float32", "max_new_tokens": 40, "fail_on_error": "100%"}
    return JobSettings.from_flat({"model": str(DEMO)} | usual | flat)


def write_schema(path: Path, schema: object = LABEL) -> str:
    path.write_text(json.dumps(schema))
    return str(path)


def check_all(rows: pl.DataFrame, schema: dict[str, Any] = LABEL) -> None:
    for row in rows.iter_rows(named=True):
        if row["finish_reason"] == "stop":
            value = json.loads(row["generated_text"])
            Draft202012Validator(schema).validate(value)
        else:
            assert row["parsed"] is None


@pytest.mark.parametrize("flat", [{}, {"temperature": 0.9}, {"engine": "naive"}])
def test_every_answer_fits_the_schema_and_is_a_typed_value(
    tmp_path: Path, flat: dict[str, Any]
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    job = settings_of(json_schema=write_schema(tmp_path / "s.json"), **flat)
    run_job(str(prompts), tmp_path / "out", job)
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok"] * 18
    assert set(rows["finish_reason"]) == {"stop"}
    assert rows.schema["parsed"] == pl.Struct({"label": pl.String, "score": pl.Int64})
    assert rows["parsed"].to_list() == [json.loads(text) for text in rows["generated_text"]]
    check_all(rows)


def test_openings_are_prefill_and_the_accounts_are_as_if_they_were_not(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    schema = write_schema(tmp_path / "s.json")
    run_job(str(prompts), tmp_path / "ours", settings_of(json_schema=schema))
    run_job(str(prompts), tmp_path / "plain", settings_of(json_schema=schema, engine="naive"))
    ours, plain = answers(tmp_path / "ours"), answers(tmp_path / "plain")
    same = ("generated_text", "finish_reason", "prompt_tokens", "completion_tokens",
            "completion_token_ids", "parsed")  # fmt: skip
    for name in same:
        assert ours[name].to_list() == plain[name].to_list(), name
    assert set(plain["forced_tokens"]) == {0}
    opening = ours["forced_tokens"].min()
    assert isinstance(opening, int) and opening >= 6  # {"label":"
    assert (ours["cached_tokens"] <= ours["prompt_tokens"]).all()
    assert (ours["reuse_depth"] <= ours["prompt_tokens"]).all()
    planned = plan_job(str(prompts), settings_of(json_schema=schema))
    assert planned.count_tokens()[0] == int(ours["prompt_tokens"].sum()) + 18 * len(
        planned.opening(0)
    )


def test_forced_tokens_of_rows_with_logprobs_have_theirs_and_are_not_decoded(
    tmp_path: Path,
) -> None:
    """Seen red: no token was forced; the last one of an answer is a forced bracket."""
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    asked = {"json_schema": write_schema(tmp_path / "s.json"), "logprobs": 2}
    run_job(str(prompts), tmp_path / "ours", settings_of(**asked))
    run_job(str(prompts), tmp_path / "plain", settings_of(**asked, engine="naive"))
    ours, plain = answers(tmp_path / "ours"), answers(tmp_path / "plain")
    assert (ours["forced_tokens"] >= 6).all() and set(plain["forced_tokens"]) == {0}
    for row, slow in zip(ours.iter_rows(named=True), plain.iter_rows(named=True), strict=True):
        assert row["completion_token_ids"] == slow["completion_token_ids"]
        assert row["parsed"] == slow["parsed"] is not None
        assert len(row["logprobs"]) == row["completion_tokens"]
        for said, truth in zip(row["logprobs"], slow["logprobs"], strict=True):
            assert said["token_id"] == truth["token_id"]
            assert said["logprob"] == pytest.approx(truth["logprob"], abs=1e-4)
    settings = AuditSettings(audit_sample="100%", audit_free_running=2, audit_arms=0)
    verdict = audit_run(Location(tmp_path / "ours"), settings)
    assert verdict.passed, verdict.reasons


class Plum(BaseModel):
    name: str
    price: float | None
    tags: list[str]
    at: dict[str, int]


def test_a_pydantic_model_is_a_schema(tmp_path: Path) -> None:
    frame = pl.DataFrame({"id": ["a", "b"], "prompt": ["A plum:", "Another plum:"]})
    run = kvcoppice.run(frame, tmp_path / "out", model=DEMO, dtype="float32", schema=Plum,
                        max_new_tokens=200)  # fmt: skip
    rows = run.answers().collect()
    assert rows.schema["parsed"] == pl.Struct(
        {"name": pl.String, "price": pl.Float64, "tags": pl.List(pl.String), "at": pl.String}
    )
    for row in rows.iter_rows(named=True):
        if row["finish_reason"] == "stop":
            Plum.model_validate_json(row["generated_text"])
            assert row["parsed"]["name"] == json.loads(row["generated_text"])["name"]
    with pytest.raises(UsageError, match="pydantic"):
        kvcoppice.run(frame, tmp_path / "x", model=DEMO, schema=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exclude each other"):
        kvcoppice.run(frame, tmp_path / "x", model=DEMO, schema=Plum, json_schema="{}")


def test_an_expression_and_a_grammar_give_text_and_no_values(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:4])
    run_job(str(prompts), tmp_path / "re", settings_of(regex="(yes|no), [0-9]{2}"))
    rows = answers(tmp_path / "re")
    assert rows["generated_text"].str.contains(r"^(yes|no), [0-9]{2}$").all()
    assert "parsed" not in rows.columns and "forced_tokens" in rows.columns
    (tmp_path / "g.lark").write_text('start: "red" | "blue" tail\ntail: /!{3}/\n')
    run_job(str(prompts), tmp_path / "g", settings_of(grammar=str(tmp_path / "g.lark")))
    assert set(answers(tmp_path / "g")["generated_text"]) <= {"red", "blue!!!"}


def test_rows_say_themselves_what_they_must_be(tmp_path: Path) -> None:
    other = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
    asked: list[Any] = [
        None,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LABEL}}},
        {"response_format": {"type": "text"}},
        {"guided_json": other},
        {"structured_outputs": {"regex": "[ab]{4}"}},
        {"guided_choice": ["one", "two"]},
        {"response_format": {"type": "json_object"}, "temperature": 0.5},
        {"guided_regex": "[", "max_new_tokens": 4},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        {"structured_outputs": {"structural_tag": "x"}},
        {"guided_json": LABEL, "guided_regex": "a"},
    ]
    texts = [None if said is None else json.dumps(said) for said in asked]
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:11], sampling_params=texts)
    run_job(str(prompts), tmp_path / "out", settings_of())
    rows = answers(tmp_path / "out").to_dicts()
    assert [row["status"] for row in rows] == ["ok"] * 7 + ["error"] * 4
    assert rows[1]["parsed"] == rows[1]["generated_text"]
    Draft202012Validator(LABEL).validate(json.loads(rows[1]["parsed"]))
    Draft202012Validator(other).validate(json.loads(rows[3]["parsed"]))
    assert set(rows[4]["generated_text"]) <= {"a", "b"} and rows[4]["parsed"] is None
    assert rows[5]["generated_text"] in ("one", "two")
    assert [row["error_type"] for row in rows[7:]] == ["BadConstraint", *["BadSamplingParams"] * 3]
    told = [row["error_message"] for row in rows[7:]]
    assert "regular expression" in told[0] and "'not'" in told[1] and "structural_tag" in told[2]
    assert "guided_json and guided_regex" in told[3]


def test_a_column_of_schemas_and_rows_whose_schema_is_none(tmp_path: Path) -> None:
    schemas = [json.dumps(LABEL), None, "{no", "[1]", json.dumps({"minLenght": 3}),
               json.dumps({"type": "integer", "minimum": 7, "maximum": 9})]  # fmt: skip
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:6], form=schemas)
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema_column="form"))
    rows = answers(tmp_path / "out").to_dicts()
    assert [row["status"] for row in rows] == ["ok", *["error"] * 4, "ok"]
    told = [row["error_message"] for row in rows]
    assert "null" in told[1] and "not valid JSON" in told[2] and "a list" in told[3]
    assert "'minLenght'" in told[4]
    assert rows[5]["parsed"] in ("7", "8", "9")
    with pytest.raises(InputError, match="--json-schema-column"):
        run_job(str(prompts), tmp_path / "no", settings_of(json_schema_column="none"))


def test_what_is_cut_has_no_value(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3])
    schema = write_schema(tmp_path / "s.json")
    for most in (1, 3, 9):
        output = tmp_path / str(most)
        run_job(str(prompts), output, settings_of(json_schema=schema, max_new_tokens=most))
        rows = answers(output)
        assert set(rows["finish_reason"]) == {"length"}
        assert set(rows["completion_tokens"]) == {most}
        assert rows["parsed"].null_count() == 3
        assert rows["generated_text"].str.starts_with("{").all()


def test_free_rows_and_held_rows_have_a_job_together(tmp_path: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": LABEL}}
    said = [json.dumps({"response_format": form}) if i % 2 else None for i in range(18)]
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS, sampling_params=said)
    free = write_prompts(tmp_path / "f.parquet", PROMPTS)
    run_job(str(prompts), tmp_path / "both", settings_of())
    run_job(str(free), tmp_path / "free", settings_of())
    both, alone = answers(tmp_path / "both").to_dicts(), answers(tmp_path / "free").to_dicts()
    for i in range(0, 18, 2):
        assert both[i]["generated_text"] == alone[i]["generated_text"]
        assert both[i]["parsed"] is None


class Cut:
    """Says stop after so many answers."""

    def __init__(self, engine: Any, after: int) -> None:
        self._engine, self._after = engine, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        for number, done in enumerate(self._engine.generate(*arguments, **named)):
            if number == self._after:
                raise Interrupted("cut")
            yield done


def test_a_resumed_job_writes_what_one_in_a_piece_does(tmp_path: Path) -> None:
    from pipeline.engine.load import make_engine

    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    flat = {"json_schema": write_schema(tmp_path / "s.json"), "rows_per_part": 3}
    run_job(str(prompts), tmp_path / "whole", settings_of(**flat))
    engine = make_engine(settings_of(**flat))
    with pytest.raises(Interrupted):
        run_job(str(prompts), tmp_path / "cut", settings_of(**flat), make_engine=on(Cut(engine, 7)))
    assert 0 < len(answers(tmp_path / "cut")) < 18
    (tmp_path / "s.json").unlink()  # the run keeps its own
    flat["json_schema"] = LABEL
    run_job(str(prompts), tmp_path / "cut", settings_of(**flat))
    names = ["generated_text", "parsed", "completion_token_ids", "prompt_tokens", "forced_tokens"]
    assert answers(tmp_path / "cut").select(names).equals(answers(tmp_path / "whole").select(names))


def test_another_schema_is_another_job(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2])
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL))
    with pytest.raises(UsageError, match="json_schema"):
        run_job(str(prompts), tmp_path / "out", settings_of(json_schema={"type": "boolean"}))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_audit_replays_under_the_same_masks(tmp_path: Path, temperature: float) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    job = settings_of(json_schema=LABEL, temperature=temperature)
    run_job(str(prompts), tmp_path / "out", job)
    settings = AuditSettings(audit_sample="100%", audit_free_running=3, audit_arms=4)
    verdict = audit_run(Location(tmp_path / "out"), settings)
    assert verdict.passed, verdict
    faults = json.loads((tmp_path / "out" / "audit" / "summary.json").read_text())["faults"]
    planted = {fault["fault"]: fault for fault in faults["each"]}
    for name in ("mask", "forced token"):
        assert planted[name]["changed"] and planted[name]["caught"], planted


def rewrite(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (part,) = (output / "data").glob("*.parquet")
    table = pq.read_table(part)
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)


@pytest.mark.fault(
    "answers of a form",
    injected="the first token of a committed answer is changed",
    outcome="the audit calls the row corrupt",
)
def test_a_wrong_forced_token_is_found_by_the_audit(tmp_path: Path, monkeypatch: Any) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3])
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema=LABEL))

    def spoil(row: dict[str, Any]) -> None:
        row["completion_token_ids"][1] += 1

    rewrite(tmp_path / "out", spoil)
    monkeypatch.setattr(RunDirectory, "check_complete", lambda self: None)
    settings = AuditSettings(audit_sample="100%", audit_arms=0)
    verdict = audit_run(Location(tmp_path / "out"), settings)
    assert not verdict.passed


@pytest.mark.parametrize(
    ("flat", "told"),
    [
        ({"json_schema": {"type": "object", "minLenght": 1}}, "'minLenght'"),
        ({"json_schema": {"type": "string", "format": "zzz"}}, "'format'"),
        ({"json_schema": {"$ref": "https://x.y/z"}}, r"\$ref"),
        ({"json_schema": "nowhere.json"}, "nowhere.json"),
        ({"json_schema": "{no"}, "not valid JSON"),
        ({"json_schema": "[1]"}, "cannot read the file|JSON object"),
        ({"regex": "(a"}, "--regex"),
        ({"regex": ""}, "not empty"),
        ({"grammar": 'start: "a" b'}, "--grammar"),
        ({"regex": "a", "json_schema": "{}"}, "exclude each other"),
        ({"json_schema": "{}", "json_schema_column": "prompt"}, "exclude each other"),
        ({"json_schema": "{}", "engine": "vllm"}, "--json-schema is for --engine prefix or naive"),
        ({"regex": "a", "engine": "echo"}, "--regex says nothing to --engine echo"),
        ({"thinking_budget": 5}, "--thinking-budget.*no tags"),
        ({"thinking_budget": -1}, "at least 0"),
        ({"regex": "a", "generation_options": ["forced_eos_token_id=3"]}, "forced_eos_token_id"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_the_model_loads(
    tmp_path: Path, flat: dict[str, Any], told: str
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2])

    def never(settings: JobSettings) -> Any:
        raise AssertionError("the model is loaded")

    with pytest.raises(UsageError, match=told):
        run_job(str(prompts), tmp_path / "out", settings_of(**flat), make_engine=never)
    assert not (tmp_path / "out").exists()


def test_scores_and_forms_exclude_each_other(tmp_path: Path) -> None:
    for flat in ({"json_schema": "{}"}, {"json_schema_column": "form"}, {"thinking_budget": 3}):
        with pytest.raises(UsageError, match="does not work with"):
            settings_of(choices="yes,no", max_new_tokens=None, **flat)


def test_the_command_takes_a_schema(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:3])
    schema = write_schema(tmp_path / "s.json")
    called = CliRunner().invoke(
        app,
        ["run", str(prompts), "-o", str(tmp_path / "out"), "--model", str(DEMO), "--json-schema",
         schema, "--progress", "none", "--dtype", "float32"],
    )  # fmt: skip
    assert called.exit_code == 0, called.output
    check_all(answers(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["counters"]["forced_tokens"] >= 0
