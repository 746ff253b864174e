"""Jobs whose rows ask for log-probabilities, samples and penalties: what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.audit.auditing import audit_run
from pipeline.audit.gate import current_verdict
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError, InputError, RunDirectoryError, UsageError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.model.model import load_model
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job, validate_input
from pipeline.settings import AuditSettings, EngineSettings, JobSettings, ModelSettings
from pipeline.storage.run_location import reading_run
from tests.tiny_job import FailingEngine, answers, echo_settings, on, write_model, write_prompts

PROMPTS = ["hello world what is it", "who are you", "tell me more", "hello world what now"]
EVERY_ROW = AuditSettings(audit_sample="100%", audit_arms=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), sharpness=3.0)


def settings(model: Path, **flat: Any) -> JobSettings:
    defaults = {"model": str(model), "max_new_tokens": 8, "dtype": "float32", "ignore_eos": True}
    return JobSettings.from_flat(defaults | flat)


def rows_of(output: Path) -> pl.DataFrame:
    with reading_run(Location(str(output))) as directory:
        return directory.scan_samples().collect().sort("row_index")


def asked(*cells: dict[str, Any] | None) -> list[str | None]:
    return [None if cell is None else json.dumps(cell) for cell in cells]


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_logprobs_are_written_as_transformers_computes_them(
    tmp_path: Path, model: Path, engine: str
) -> None:
    cells = asked({"logprobs": True, "top_logprobs": 2}, None, {"logprobs": 0}, {"logprobs": False})
    path = write_prompts(tmp_path / "p.parquet", PROMPTS, sampling_params=cells)
    run_job(str(path), tmp_path / "out", settings(model, engine=engine, logprobs=3))
    rows = answers(tmp_path / "out")
    kind = (
        pq.read_schema(next((tmp_path / "out" / "data").glob("*.parquet"))).field("logprobs").type
    )
    assert [field.name for field in kind.value_type] == ["token", "token_id", "logprob", "top"]
    tokenizer, loaded = (
        kind.from_pretrained(model) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    for row, most in zip(rows.iter_rows(named=True), (2, 3, 0, None), strict=True):
        if most is None:
            assert row["logprobs"] is None
            continue
        prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
        output = torch.tensor([row["completion_token_ids"]])
        with torch.inference_mode():
            logits = loaded(torch.cat([prompt, output], 1)).logits[0, prompt.shape[1] - 1 : -1]
        truth = torch.log_softmax(logits.double(), -1)
        said = row["logprobs"]
        assert [token["token_id"] for token in said] == row["completion_token_ids"]
        spelt = "".join(token["token"] for token in said)
        assert spelt.replace("<eos>", "").replace("<unk>", "") == row["generated_text"]
        for at, token in enumerate(said):
            assert token["logprob"] == pytest.approx(float(truth[at, token["token_id"]]), abs=1e-4)
            assert [top["logprob"] for top in token["top"]] == pytest.approx(
                truth[at].topk(most).values.tolist() if most else [], abs=1e-4
            )
            assert all(top["token"] == tokenizer.decode([top["token_id"]]) for top in token["top"])


def test_nobody_gets_a_column_that_nobody_asked_for(tmp_path: Path, model: Path) -> None:
    path = write_prompts(tmp_path / "p.parquet", PROMPTS, samples=[1, 2, 3, 4], logprobs=[0.5] * 4)
    run_job(str(path), tmp_path / "out", settings(model))
    rows = answers(tmp_path / "out")
    assert rows["samples"].to_list() == [1, 2, 3, 4] and rows["logprobs"].to_list() == [0.5] * 4
    assert "sample_index" not in rows.columns


def test_samples_are_one_row_and_exploded_a_row_each(tmp_path: Path, model: Path) -> None:
    cells = asked({"n": 5}, {"temperature": 0.0}, {"n": 1}, None)
    path = write_prompts(tmp_path / "p.parquet", PROMPTS, sampling_params=cells)
    flat: dict[str, Any] = {"temperature": 1.0, "seed": 4}
    run_job(str(path), tmp_path / "one", settings(model, **flat))
    whole, one = rows_of(tmp_path / "one"), {"generated_text", "finish_reason"}
    assert [len(samples) for samples in whole["samples"]] == [5, 1, 1, 1]
    for row in whole.iter_rows(named=True):
        first = row["samples"][0]
        assert {name: first[name] for name in one} == {name: row[name] for name in one}
        assert first["completion_token_ids"] == row["completion_token_ids"]
    assert len({sample["generated_text"] for sample in whole["samples"][0]}) > 2
    run_job(str(path), tmp_path / "each", settings(model, **flat, explode=True))
    each = rows_of(tmp_path / "each").sort("row_index", "sample_index")
    assert each["row_index"].to_list() == [0] * 5 + [1, 2, 3]
    assert each["id"].to_list() == ["r0"] * 5 + ["r1", "r2", "r3"]
    assert each["sample_index"].to_list() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert "samples" not in each.columns and each["prompt"].to_list()[:5] == PROMPTS[:1] * 5
    flattened = [s["generated_text"] for samples in whole["samples"] for s in samples]
    assert each["generated_text"].to_list() == flattened
    # Without samples each row's answer is what it was before: that of the first sample.
    plain = write_prompts(
        tmp_path / "q.parquet",
        PROMPTS,
        sampling_params=asked(None, {"temperature": 0.0}, None, None),
    )
    run_job(str(plain), tmp_path / "plain", settings(model, **flat))
    assert (
        rows_of(tmp_path / "plain")["generated_text"].to_list() == whole["generated_text"].to_list()
    )


@pytest.mark.parametrize("explode", [False, True])
def test_every_prompt_token_is_counted_once(tmp_path: Path, model: Path, explode: bool) -> None:
    path = write_prompts(tmp_path / "p.parquet", PROMPTS * 2, id=[f"x{i}" for i in range(8)])
    many = settings(model, temperature=1.0, n=16, explode=explode)
    run_job(str(path), tmp_path / "out", many)
    one = settings(model, temperature=1.0)
    run_job(str(path), tmp_path / "one", one)
    counters = [
        json.loads((tmp_path / name / "run.json").read_text())["counters"]
        for name in ("out", "one")
    ]
    for name in ("prefilled_tokens", "unique_tokens", "prompt_tokens", "rows_ok", "cached_tokens"):
        assert counters[0][name] == counters[1][name], name
    rows = rows_of(tmp_path / "out")
    assert len(rows) == (128 if explode else 8)
    computed = int(rows["prompt_tokens"].sum()) - int(rows["cached_tokens"].sum())
    assert computed == counters[0]["unique_tokens"] == counters[0]["prefilled_tokens"]
    assert counters[0]["generated_tokens"] == 16 * 8 * 8


@pytest.mark.parametrize("explode", [False, True])
@pytest.mark.parametrize("preserve_order", [False, True])
def test_a_row_is_there_when_all_its_samples_are_and_a_resume_adds_the_rest(
    tmp_path: Path, tokenizer_folder: Path, preserve_order: bool, explode: bool
) -> None:
    path = write_prompts(tmp_path / "p.parquet", [f"prompt {i}" for i in range(20)])
    flat = {"n": 3, "temperature": 1.0, "rows_per_part": 4, "preserve_order": preserve_order}
    asked_for = echo_settings(tokenizer_folder, **flat, explode=explode)

    def crash() -> None:
        raise EngineError("the device fell over")

    out = tmp_path / "out"
    with pytest.raises(EngineError, match="fell over"):
        run_job(str(path), out, asked_for, make_engine=on(FailingEngine(46, crash)))
    before = rows_of(out)
    assert before["row_index"].n_unique() <= 15
    outcome = run_job(str(path), out, asked_for)
    rows = rows_of(out)
    assert len(rows) == (60 if explode else 20) and rows["row_index"].n_unique() == 20
    assert outcome.counters["rows_ok"] == 20
    if explode:
        assert (
            rows.group_by("row_index").agg(pl.col("sample_index").sort())["sample_index"].to_list()
            == [[0, 1, 2]] * 20
        )
    else:
        assert all(len(samples) == 3 for samples in rows["samples"])
    with reading_run(Location(str(out))) as directory:
        directory.check_complete()
        assert directory.count_rows() == (20, 0) and len(directory.done_rows()) == 20
    assert run_job(str(path), out, asked_for).was_complete
    with pytest.raises(RunDirectoryError, match="explode"):
        run_job(str(path), out, echo_settings(tokenizer_folder, **flat, explode=not explode))


@pytest.mark.parametrize("explode", [False, True])
def test_the_audit_replays_samples_under_all_that_their_rows_ask(
    tmp_path: Path, model: Path, explode: bool
) -> None:
    path = write_prompts(tmp_path / "p.parquet", PROMPTS * 3, id=[f"x{i}" for i in range(12)])
    flat: dict[str, Any] = {
        "temperature": 0.9, "n": 4, "explode": explode, "presence_penalty": 0.7, "logprobs": 1,
        "generation_options": ["min_tokens=3", "repetition_penalty=1.2", 'bad_words=["e"]'],
    }  # fmt: skip
    out = tmp_path / "out"
    run_job(str(path), out, settings(model, **flat))
    verdict = audit_run(Location(str(out)), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    audited = pl.read_parquet(out / "audit" / "audit.parquet")
    assert len(audited) == 12 and audited["audit_sample"].n_unique() > 1
    with reading_run(Location(str(out))) as directory:
        found = current_verdict(directory)
    logprobs = json.loads((out / "audit" / "summary.json").read_text())["logprobs"]
    assert logprobs["rows"] == 12 and 0 < logprobs["max_deviation"] < 1e-4
    assert found is not None
    texts = rows_of(out)["generated_text"].to_list()
    assert not any("e" in text for text in texts)


class Spoilt(PrefixEngine):
    """Gives every sample but the first the answer of the first."""

    def generate(self, plan: Plan, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        first: dict[int, Completion] = {}
        for done in super().generate(plan, *args, **kwargs):
            row = int(plan.sequences.row[done.sequence])
            told = first.setdefault(row, done)
            yield replace(told, sequence=done.sequence, cached_tokens=done.cached_tokens)


def test_an_audit_finds_samples_that_are_not_drawn_by_their_own_noise(
    tmp_path: Path, model: Path
) -> None:
    path = write_prompts(tmp_path / "p.parquet", PROMPTS)
    loaded = load_model(ModelSettings(model=str(model), dtype="float32"))
    engine, out = Spoilt(loaded, EngineSettings()), tmp_path / "out"
    run_job(str(path), out, settings(model, temperature=1.0, n=8), make_engine=on(engine))
    verdict = audit_run(Location(str(out)), EVERY_ROW)
    assert not verdict.passed and any("corrupt" in reason for reason in verdict.reasons)


class Louder(PrefixEngine):
    """Says of each token that it was twice as likely."""

    def generate(self, plan: Plan, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        for done in super().generate(plan, *args, **kwargs):
            louder = tuple(said._replace(logprob=said.logprob + 0.69) for said in done.logprobs)
            yield replace(done, logprobs=louder)


def test_an_audit_finds_log_probabilities_that_are_not_the_model_s(
    tmp_path: Path, model: Path
) -> None:
    path = write_prompts(tmp_path / "p.parquet", PROMPTS)
    engine = Louder(load_model(ModelSettings(model=str(model), dtype="float32")), EngineSettings())
    run_job(str(path), tmp_path / "out", settings(model, logprobs=0), make_engine=on(engine))
    verdict = audit_run(Location(str(tmp_path / "out")), AuditSettings(audit_arms=0))
    assert not verdict.passed
    assert any("a log-probability is 0.69 nats" in reason for reason in verdict.reasons)


def test_penalties_change_answers_and_text_is_shown_as_asked(tmp_path: Path, model: Path) -> None:
    prompts = ["hello world"] * 8
    cells = asked(
        None,
        {"frequency_penalty": 2.0},
        {"logit_bias": {"5": 100}},
        {"allowed_token_ids": [7, 8]},
        {"allowed_token_ids": [7, 8], "stop_token_ids": [7, 8]},
        {"allowed_token_ids": [7], "stop": "f", "include_stop_str_in_output": True},
        {"allowed_token_ids": [7], "stop": "f", "min_tokens": 2},
        {"allowed_token_ids": [1], "skip_special_tokens": False},
    )
    path = write_prompts(tmp_path / "p.parquet", prompts, sampling_params=cells)
    run_job(str(path), tmp_path / "out", settings(model))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok"] * 8
    texts, ids = rows["generated_text"].to_list(), rows["completion_token_ids"].to_list()
    assert texts[1] != texts[0] and len(set(ids[1])) >= len(set(ids[0]))
    assert texts[2] == "d" * 8
    assert set(texts[3]) <= set("fg") and len(texts[3]) == 8
    assert texts[4] == "" and len(ids[4]) == 1 and rows["finish_reason"][4] == "stop"
    assert texts[5] == "f" and ids[5] == [7] and rows["finish_reason"][5] == "stop"
    assert texts[6] == "ff" and ids[6] == [7, 7, 7] and rows["finish_reason"][6] == "stop"
    assert texts[7] == "<eos>" * 8
    verdict = audit_run(
        Location(str(tmp_path / "out")), AuditSettings(audit_sample="100%", audit_arms=0)
    )
    assert verdict.passed and verdict.rows_audited == 8, verdict.reasons


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"n": 3}, "n is 3, but a temperature of 0"),
        ({"n": 0}, "n must lie in"),
        ({"n": 10**6, "temperature": 1}, "n must lie in"),
        ({"logprobs": 100}, "logprobs must lie in"),
        ({"logit_bias": {"44": 1}}, "logit_bias names the token id 45"),
        ({"logit_bias": {"45": 1}}, "logit_bias names the token id 45"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids names the token id 1000000"),
        ({"bad_words": ["  "]}, "bad_words"),
        ({"prompt_logprobs": 3}, "asks for prompt_logprobs"),
        ({"echo": True}, "asks for echo"),
        ({"min_tokens": 20}, "min_tokens is 20, and max_new_tokens 8"),
    ],
)
def test_a_row_s_impossible_wish_is_its_own_error(
    tmp_path: Path, model: Path, cell: dict[str, Any], message: str
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["hi", "ho"], sampling_params=asked(cell, None))
    found = validate_input(str(path), settings(model))
    if "45" in message and "44" in cell["logit_bias"]:
        assert not found["rows_rejected"]
        return
    assert found["rows_rejected"] == 1
    assert message in found["examples"][0]["message"]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"n": 0}, "setting n: must be at least 1"),
        ({"n": 10**6}, "setting n: must be at most 16384"),
        ({"n": 4}, "n is 4, but a temperature of 0"),
        ({"logprobs": 100}, "setting logprobs: must be at most 20"),
        ({"presence_penalty": 3}, "setting presence-penalty: must be at most 2.0"),
        ({"generation_options": ['logit_bias={"99": 1}']}, "logit_bias names the token id 99"),
        ({"generation_options": ["min_tokens=-1"]}, "min_tokens: "),
        ({"generation_options": ["n=2"]}, "a flag of its own, --n"),
        ({"logprobs": 1, "engine": "echo"}, "the echo engine has none"),
        ({"n": 2, "temperature": 1.0, "conversation_column": "c"}, "--n 2"),
        ({"explode": True, "choices": "a,b"}, "--explode"),
        ({"n": 2, "choices": "a,b"}, "--n"),
        ({"logprobs": 2, "choices": "a,b"}, "--logprobs"),
    ],
)
def test_a_job_s_impossible_wish_is_refused_before_a_model_is_loaded(
    tmp_path: Path, model: Path, flat: dict[str, Any], message: str
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["hi"], c=["c"], turn=[0])
    with pytest.raises(UsageError) as error:
        asked_for = JobSettings.from_flat({"model": str(model)} | flat)
        run_job(str(path), tmp_path / "out", asked_for)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_turns_of_conversations_have_one_answer_but_log_probabilities(
    tmp_path: Path, model: Path
) -> None:
    path = write_prompts(
        tmp_path / "p.parquet", ["hello", "and then", "who"], c=["a", "a", "b"], turn=[0, 1, 0],
        sampling_params=asked({"logprobs": 2}, {"logprobs": 2}, {"n": 2, "temperature": 1.0}),
    )  # fmt: skip
    flat = {"conversation_column": "c", "turn_column": "turn", "fail_on_error": "100%"}
    run_job(str(path), tmp_path / "out", settings(model, **flat))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok", "ok", "error"]
    assert "n is 2, but the next turn of a conversation" in rows["error_message"][2]
    for row in rows.head(2).iter_rows(named=True):
        assert [said["token_id"] for said in row["logprobs"]] == row["completion_token_ids"]


def test_names_that_the_input_has_already_are_kept_or_refused_early(
    tmp_path: Path, model: Path
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["hi"], samples=["mine"])
    run_job(str(path), tmp_path / "out", settings(model, n=2, temperature=1.0))
    (row,) = rows_of(tmp_path / "out").iter_rows(named=True)
    assert len(row["samples"]) == 2 and row["input_samples"] == "mine"
    both = write_prompts(tmp_path / "q.parquet", ["hi"], samples=["mine"], input_samples=["x"])
    with pytest.raises(InputError, match="input_samples"):
        run_job(str(both), tmp_path / "two", settings(model, n=2, temperature=1.0))
    assert not (tmp_path / "two").exists()


def test_batch_requests_come_back_with_all_choices_and_their_probabilities(
    tmp_path: Path, model: Path
) -> None:
    bodies = [
        {"prompt": "hello", "n": 3, "temperature": 1.0, "logprobs": 2, "max_tokens": 4},
        {"prompt": "who are you", "max_tokens": 3, "presence_penalty": 1.5},
    ]
    lines = [
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    source = tmp_path / "batch.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_job(str(source), tmp_path / "out", settings(model))
    convert(Location(str(tmp_path / "out")), Location(str(tmp_path / "answers.jsonl")))
    first, second = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    body = first["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 12
    for choice in body["choices"]:
        said = choice["logprobs"]
        assert "".join(said["tokens"]) == choice["text"]
        assert len(said["token_logprobs"]) == len(said["top_logprobs"]) == 4
        assert said["text_offset"] == [0, 1, 2, 3]
    (choice,) = second["response"]["body"]["choices"]
    assert (
        choice["logprobs"] is None and second["response"]["body"]["usage"]["completion_tokens"] == 3
    )
    run_job(str(source), tmp_path / "each", settings(model, explode=True))
    with pytest.raises(RunDirectoryError, match="without --explode"):
        convert(Location(str(tmp_path / "each")), Location(str(tmp_path / "no.jsonl")))


def test_columns_of_a_table_ask_like_fields_of_a_request(tmp_path: Path, model: Path) -> None:
    columns: dict[str, Any] = {
        "logprobs": pa.array([2, None], pa.int64()),
        "presence_penalty": [None, 2.0],
        "stop_token_ids": pa.array([None, list(range(2, 45))], pa.list_(pa.int64())),
        "n": [7, 8],
    }
    path = write_prompts(tmp_path / "p.parquet", ["hello", "hello"], **columns)
    found = validate_input(str(path), settings(model))
    assert any("presence_penalty" in note and "own settings" in note for note in found["notes"])
    assert any("not used" in note and " n" in note for note in found["notes"])
    run_job(str(path), tmp_path / "out", settings(model))
    rows = answers(tmp_path / "out")
    assert [row and len(row) for row in rows["logprobs"].to_list()] == [8, None]
    assert rows["completion_tokens"].to_list()[1] == 1 and rows["n"].to_list() == [7, 8]


def test_greedy_rows_that_ask_for_different_things_are_not_one(tmp_path: Path, model: Path) -> None:
    cells = asked(None, {"logprobs": 1}, {"logprobs": 1}, {"min_tokens": 2})
    path = write_prompts(tmp_path / "p.parquet", ["hello"] * 4, sampling_params=cells)
    run_job(str(path), tmp_path / "out", settings(model))
    rows = answers(tmp_path / "out")
    assert rows["dedup_of"].to_list() == [None, None, "r1", None]
    assert rows["logprobs"].to_list()[1] == rows["logprobs"].to_list()[2] != None  # noqa: E711
    assert len(set(rows["generated_text"])) == 1


class Failing(EchoEngine):
    """Fails at one sample of a row."""

    def generate(self, plan: Plan, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        for done in super().generate(plan, *args, **kwargs):
            if plan.sequences.sample[done.sequence] == 1 and not plan.sequences.row[done.sequence]:
                done = replace(
                    done, finish_reason="error", error_type="OutOfMemory", error_message="no room"
                )
            yield done


@pytest.mark.parametrize("explode", [False, True])
def test_a_sample_that_fails_is_an_error_of_its_row_alone(
    tmp_path: Path, tokenizer_folder: Path, explode: bool
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["one", "two"])
    flat = {"n": 3, "temperature": 1.0, "fail_on_error": "100%", "explode": explode}
    out = tmp_path / "out"
    outcome = run_job(
        str(path), out, echo_settings(tokenizer_folder, **flat), make_engine=on(Failing())
    )
    assert outcome.reasons == {"OutOfMemory": 1}
    rows = rows_of(out)
    assert rows["status"].to_list() == ["error"] + ["ok"] * (3 if explode else 1)
    assert rows["error_message"][0] == "no room" and rows["generated_text"][0] is None
    assert pl.read_parquet(out / "failed.parquet")["id"].to_list() == ["r0"]


def test_a_part_holds_no_more_answers_than_rows_are_asked_for(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = write_prompts(tmp_path / "p.parquet", [f"prompt {i}" for i in range(10)])
    flat = {"n": 5, "temperature": 1.0, "rows_per_part": 10}
    run_job(str(path), tmp_path / "out", echo_settings(tokenizer_folder, **flat))
    parts = [pl.read_parquet(part) for part in (tmp_path / "out" / "data").glob("*.parquet")]
    assert [len(part) for part in parts] == [2] * 5


def test_kv_of_an_earlier_run_serves_all_samples(tmp_path: Path, model: Path) -> None:
    path = write_prompts(
        tmp_path / "p.parquet", [f"hello world {'abc' * 20} {i}" for i in range(4)]
    )
    flat: dict[str, Any] = {"kv_store": str(tmp_path / "store"), "temperature": 1.0, "n": 6}
    run_job(str(path), tmp_path / "cold", settings(model, **flat))
    run_job(str(path), tmp_path / "warm", settings(model, **flat))
    cold, warm = rows_of(tmp_path / "cold"), rows_of(tmp_path / "warm")
    assert cold["samples"].to_list() == warm["samples"].to_list()
    counters = json.loads((tmp_path / "warm" / "run.json").read_text())["counters"]
    assert counters["loaded_tokens"] > 0
    computed = int(warm["prompt_tokens"].sum()) - int(warm["cached_tokens"].sum())
    assert computed == counters["prefilled_tokens"] < counters["unique_tokens"]


def test_documents_and_samples_exclude_each_other(tmp_path: Path, model: Path) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["hi"], documents=[["one. ", "two. "]])
    flat: dict[str, Any] = {"reuse": "epic", "n": 2, "temperature": 1.0}
    with pytest.raises(UsageError, match="n is 2, but --reuse epic"):
        run_job(str(path), tmp_path / "out", settings(model, **flat))


def test_shards_have_whole_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write_prompts(tmp_path / "p.parquet", [f"prompt {i}" for i in range(12)])
    found: list[int] = []
    for shard in range(3):
        flat = {"n": 4, "temperature": 1.0, "num_shards": 3, "shard": shard}
        out = tmp_path / f"out{shard}"
        run_job(str(path), out, echo_settings(tokenizer_folder, **flat))
        rows = rows_of(out)
        assert all(len(samples) == 4 for samples in rows["samples"])
        found += rows["row_index"].to_list()
    assert sorted(found) == list(range(12))
