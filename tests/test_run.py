"""Whole jobs with the echo engine, whose answers can be computed by hand."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.engine.load import make_engine
from pipeline.errors import (
    InputError,
    Interrupted,
    ModelError,
    RunDirectoryError,
    StorageError,
    TooManyFailedRows,
    UsageError,
)
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.model import identity
from pipeline.plan_files import write_plan
from pipeline.run import plan_job, run_job, validate_input
from pipeline.settings import JobSettings
from pipeline.status import read_status
from tests.tiny_job import PROMPTS, answers, echo_settings, write_model, write_prompts


def test_every_row_gets_its_answer_and_keeps_its_columns(
    tmp_path: Path, settings: JobSettings
) -> None:
    prompts = [*PROMPTS, None]
    source = write_prompts(
        tmp_path / "p.parquet", prompts, colour=list("abcdefg"), status=list("tuvwxyz")
    )
    outcome = run_job(str(source), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["id"].to_list() == [f"r{i}" for i in range(7)]
    expected = [p[-4:][::-1] for p in PROMPTS]
    assert rows["generated_text"].to_list() == [*expected, None]
    assert rows["colour"].to_list() == list("abcdefg")
    assert rows["input_status"].to_list() == list("tuvwxyz")
    assert rows["status"].to_list() == ["ok"] * 6 + ["error"]
    assert rows["error_type"][6] == "NullPrompt"
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert outcome.rows_failed == 1
    assert (outcome.counters["rows_ok"], outcome.counters["rows_in"]) == (6, 7)


@pytest.mark.fault(
    "duplicate prompts",
    injected="one prompt in three rows, greedy",
    outcome="runs once; the copies name the row that ran",
)
def test_duplicates_run_once_and_name_the_row_that_ran(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    outcome = run_job(str(source), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["dedup_of"].to_list() == [None, None, "r0", None, "r0", None]
    assert rows["cached_tokens"].to_list() == [0, 0, 11, 0, 11, 0]
    assert rows["prefill_s"].to_list()[2] == 0.0
    assert rows["latency_s"][2] == rows["latency_s"][0]
    counters = outcome.counters
    assert counters["prefilled_tokens"] + counters["cached_tokens"] == counters["prompt_tokens"]


def test_sampled_rows_are_never_copied(tmp_path: Path, settings: JobSettings) -> None:
    source = write_prompts(
        tmp_path / "p.parquet", ["hello", "hello"], sampling_params=[{"temperature": 1.0}] * 2
    )
    run_job(str(source), tmp_path / "out", settings)
    assert answers(tmp_path / "out")["dedup_of"].to_list() == [None, None]


def test_parts_hold_no_more_rows_than_asked(tmp_path: Path, settings: JobSettings) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", settings)
    parts = sorted((tmp_path / "out" / "data").iterdir())
    assert [pl.read_parquet(part).height for part in parts] == [2, 2, 2]


def test_preserved_order_puts_consecutive_rows_into_parts(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = write_prompts(tmp_path / "p.parquet", [*PROMPTS, None, "aa", "ab"])
    settings = echo_settings(
        tokenizer_folder, preserve_order=True, rows_per_part=4, fail_on_error="1"
    )
    run_job(str(source), tmp_path / "out", settings)
    parts = sorted((tmp_path / "out" / "data").iterdir())
    rows = [pl.read_parquet(part)["row_index"].to_list() for part in parts]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_a_sealed_run_has_nothing_left_to_do(tmp_path: Path, settings: JobSettings) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    first = run_job(str(source), tmp_path / "out", settings)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet"))
    second = run_job(str(source), tmp_path / "out", settings)
    assert (first.was_complete, second.was_complete) == (False, True)
    assert first.counters == second.counters
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet"))


@pytest.mark.fault(
    "input changed between runs",
    injected="other rows or settings before the same command",
    outcome="RunDirectoryError, exit code 2, the field is named",
)
def test_another_job_is_refused_by_name_of_the_field(tmp_path: Path, settings: JobSettings) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", settings)
    flat = {"max_new_tokens": 5, "model": settings.model.model, "engine": "echo"}
    with pytest.raises(RunDirectoryError, match="another max_new_tokens"):
        run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    write_prompts(source, ["other"])
    with pytest.raises(RunDirectoryError, match="input"):
        run_job(str(source), tmp_path / "out", settings)


def test_batch_sizes_may_change_between_sessions(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder))
    wider = echo_settings(tokenizer_folder, max_rows=3, rows_per_part=1, kv_budget="1GiB")
    assert run_job(str(source), tmp_path / "out", wider).was_complete


@pytest.mark.fault(
    "duplicate ids",
    injected="one id in two rows",
    outcome="InputError, exit code 2, the id is named; no folder is made",
)
def test_duplicate_ids_are_refused_before_anything_is_made(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["a", "b", "c"], id=["x", "y", "x"])
    with pytest.raises(InputError, match="x"):
        run_job(str(source), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_too_many_failed_rows_are_an_error_after_all_is_written(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["a", None, None])
    settings = echo_settings(tokenizer_folder, fail_on_error="1")
    with pytest.raises(TooManyFailedRows, match="2 of 3"):
        run_job(str(source), tmp_path / "out", settings)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert pl.read_parquet(tmp_path / "out" / "failed.parquet")["id"].to_list() == ["r1", "r2"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "complete"


def test_planning_writes_what_running_writes(tmp_path: Path, settings: JobSettings) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    write_plan(plan_job(str(source), settings), tmp_path / "plan")
    run_job(str(source), tmp_path / "out", settings)
    for name in ("plan.parquet", "tree.parquet"):
        planned = pl.read_parquet(tmp_path / "plan" / name)
        assert planned.equals(pl.read_parquet(tmp_path / "out" / "plan" / name))
    texts = [(tmp_path / folder / "summary.json").read_text() for folder in ("plan", "out/plan")]
    assert texts[0] == texts[1]


def test_validation_counts_bad_rows_and_shows_the_first_prompt(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", [None, "ab", ""])
    found = validate_input(str(source), settings)
    assert found["reasons"] == {"NullPrompt": 1, "EmptyPrompt": 1}
    assert found["first"] == {"id": "r1", "rendered": "ab", "token_ids": [2, 3]}


def test_answers_are_cut_before_a_stop_string(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["abcd"])
    run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder, stop=["b"]))
    row = answers(tmp_path / "out").row(0, named=True)
    assert (row["generated_text"], row["completion_tokens"]) == ("dc", 4)


@pytest.mark.fault(
    "prompt at the limit",
    injected="127 tokens of a context of 128",
    outcome="answered with one token",
)
@pytest.mark.fault(
    "prompt one above the limit",
    injected="128 tokens of a context of 128",
    outcome="OverlongPrompt, or cut from the left on request",
)
@pytest.mark.fault(
    "prompt of ten times the limit",
    injected="1,280 tokens of a context of 128",
    outcome="OverlongPrompt",
)
@pytest.mark.parametrize(
    ("rule", "length", "expected"),
    [
        ("error", 127, ("ok", 127, 1)),
        ("error", 128, ("error", 0, 0)),
        ("error", 1280, ("error", 0, 0)),
        ("truncate-left", 128, ("ok", 120, 8)),
        ("truncate-left", 127, ("ok", 127, 1)),
    ],
)
def test_prompts_at_the_limit_of_the_context(
    tmp_path: Path, model_folder: Path, rule: str, length: int, expected: tuple[str, int, int]
) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["b" * (length - 1) + "a"])
    flat = {"model": str(model_folder), "engine": "echo", "on_overlong": rule}
    flat |= {"max_new_tokens": "8", "fail_on_error": "1"}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    row = answers(tmp_path / "out").row(0, named=True)
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == expected
    if row["status"] == "ok":
        assert row["generated_text"][0] == "a"
    else:
        assert row["error_type"] == "OverlongPrompt"


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_a_real_model_computes_what_the_plan_says(
    tmp_path: Path, model_folder: Path, engine: str
) -> None:
    prefix = "answer this question in a word: "
    prompts = [prefix + p for p in ("why?", "who?", "why?", "when was it?")]
    source = write_prompts(tmp_path / "p.parquet", prompts)
    flat = {"model": str(model_folder), "engine": engine, "max_new_tokens": 5, "dtype": "float32"}
    outcome = run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    counters = outcome.counters
    assert counters["rows_ok"] == 4
    assert counters["prefilled_tokens"] + counters["cached_tokens"] == counters["prompt_tokens"]
    assert (counters["prefilled_tokens"] == counters["unique_tokens"]) is (engine == "prefix")


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_of_a_job_answer_every_row_once(
    tmp_path: Path, model_folder: Path, num_shards: int
) -> None:
    """Each in a folder of its own, complete by itself; more shards than groups leave some empty.

    Seen red: rows that cannot run written by every shard, tokens of all shards expected of one.
    """
    prompts = [f"{'first' if i % 2 else 'second'} group, {i}?" for i in range(9)]
    source = write_prompts(tmp_path / "p.parquet", [*prompts, None, prompts[0], None])
    flat = {"model": str(model_folder), "max_new_tokens": 2, "fail_on_error": "2"}
    whole = run_job(str(source), tmp_path / "whole", JobSettings.from_flat(flat))
    computed, rows = 0, []
    for shard in range(num_shards):
        out = tmp_path / f"shard-{shard}"
        settings = JobSettings.from_flat(flat | {"num_shards": num_shards, "shard": shard})
        counters = run_job(str(source), out, settings).counters
        assert counters["prefilled_tokens"] == counters["unique_tokens"]
        assert run_job(str(source), out, settings).was_complete
        state = read_status(Location(out))
        assert (state["rows"], state["rows_left"]) == (len(answers(out)), 0)
        computed += int(counters["prefilled_tokens"])
        rows.append(answers(out))
    together = pl.concat(rows).sort("row_index")
    expected = answers(tmp_path / "whole")
    for column in ("row_index", "id", "completion_token_ids", "status", "reuse_depth"):
        assert together[column].to_list() == expected[column].to_list()
    assert computed >= whole.counters["prefilled_tokens"]


def test_a_batch_file_comes_back_as_responses(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Requests to rows, a run, its directory to responses: as OpenAI's batch service would."""
    requests = [
        {"custom_id": n, "url": "/v1/completions", "body": {"prompt": p, "max_tokens": 40}}
        for n, p in (("x", "hello"), ("y", ""), ("z", "bye"))
    ]
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps(request) + "\n" for request in requests))
    convert(Location(lines), Location(tmp_path / "rows.parquet"))
    settings = echo_settings(tokenizer_folder, fail_on_error="1")
    run_job(str(tmp_path / "rows.parquet"), tmp_path / "out", settings)
    (tmp_path / "out" / "_SUCCESS").rename(tmp_path / "mark")
    with pytest.raises(RunDirectoryError, match="not complete"):
        convert(Location(tmp_path / "out"), Location(tmp_path / "out.jsonl"))
    (tmp_path / "mark").rename(tmp_path / "out" / "_SUCCESS")
    assert convert(Location(tmp_path / "out"), Location(tmp_path / "out.jsonl")) == 3
    x, y, z = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [line["custom_id"] for line in (x, y, z)] == ["x", "y", "z"]
    (choice,) = x["response"]["body"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("olleh", "length")
    assert x["response"]["body"]["usage"]["prompt_tokens"] == 5
    assert y["response"] is None and y["error"]["message"] == "the prompt is empty"


def test_responses_come_in_the_order_of_the_input(tmp_path: Path, settings: JobSettings) -> None:
    """Seen red: in the order of the parts, and the lengths of one line for another's."""
    prompts = [f"{'ab'[i % 2]}{i * 7 % 10}" + "c" * i for i in range(20)]
    source = write_prompts(tmp_path / "p.parquet", prompts)
    run_job(str(source), tmp_path / "out", settings)
    parts = sorted((tmp_path / "out" / "data").iterdir())
    written = [row for part in parts for row in pl.read_parquet(part)["row_index"]]
    assert len(parts) == 10 and written != sorted(written)
    assert convert(Location(tmp_path / "out"), Location(tmp_path / "new" / "out.jsonl")) == 20
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"r{i}" for i in range(20)]
    texts = [line["response"]["body"]["choices"][0]["text"] for line in lines]
    assert texts == answers(tmp_path / "out")["generated_text"].to_list()


@pytest.mark.parametrize("limit", [None, 2])
def test_json_lines_run_as_they_are(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """A file of batch requests gives what its conversion gives; another file is another input."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = tmp_path / "in.jsonl"
    lines.write_text(
        "".join(
            json.dumps({"custom_id": n, "url": "/v1/completions", "body": {"prompt": p}}) + "\n"
            for n, p in (("x", "hello"), ("y", ""), ("z", "bye"))
        )
    )
    convert(Location(lines), Location(tmp_path / "rows.parquet"))
    settings = echo_settings(tokenizer_folder, fail_on_error="1", limit=limit)
    assert validate_input(str(lines), settings)["reasons"] == {"EmptyPrompt": 1}
    run_job(str(tmp_path / "rows.parquet"), tmp_path / "converted", settings)
    run_job(str(lines), tmp_path / "out", settings)
    assert run_job(str(lines), tmp_path / "out", settings).was_complete
    columns = ["id", "generated_text", "status", "custom_id", "prompt", "sampling_params"]
    assert answers(tmp_path / "out")[columns].equals(answers(tmp_path / "converted")[columns])
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert manifest["input"]["argument"] == str(lines)
    lines.write_text(lines.read_text() + "\n")
    with pytest.raises(RunDirectoryError, match="another input"):
        run_job(str(lines), tmp_path / "out", settings)


def test_a_model_that_fails_the_self_test_gets_the_naive_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong merging must never reach an answer: the run goes on without reuse, and says why."""
    from pipeline.engine.kernels import partial
    from pipeline.engine.load import make_engine
    from tests.engine import tiny

    tiny.build_model("llama").save_pretrained(tmp_path)
    settings = JobSettings.from_flat({"model": str(tmp_path), "kernels": "torch"})
    engine = make_engine(settings)
    assert engine.name == "prefix" and "self-test passed" in engine.notes[0]
    monkeypatch.setattr(partial, "merge", lambda *parts: None)
    engine = make_engine(settings)
    assert engine.name == "naive" and "in full by the naive engine" in engine.notes[0]


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_a_process_that_does_many_jobs_keeps_nothing_of_one(
    tmp_path: Path, model_folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that serves nights does. Seen red: all that there was at a job's start, frozen."""
    models: list[weakref.ref[Any]] = []

    def watch(settings: JobSettings) -> Any:
        made: Any = make_engine(settings)
        models.append(weakref.ref(made.loaded.model))
        return made

    source = write_prompts(tmp_path / "p.parquet", ["why? who?", "why? when?"])
    flat = {"model": str(model_folder), "engine": engine, "max_new_tokens": 2}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat), make_engine=watch)
    gc.collect()
    assert [model() for model in models] == [None]
    assert gc.get_freeze_count() == 0


def test_a_complete_run_that_lost_a_part_makes_it_again(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", settings)
    before = answers(tmp_path / "out")["generated_text"].to_list()
    sorted((tmp_path / "out" / "data").iterdir())[0].unlink()
    assert not run_job(str(source), tmp_path / "out", settings).was_complete
    rows = answers(tmp_path / "out")
    assert rows["row_index"].to_list() == list(range(6))
    assert rows["generated_text"].to_list() == before
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.fault(
    "committed part altered",
    injected="a byte added to a part of a sealed run",
    outcome="StorageError, exit code 1, the part is named",
)
def test_a_complete_run_with_an_altered_part_is_not_called_complete(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", settings)
    part = sorted((tmp_path / "out" / "data").iterdir())[0]
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(StorageError, match="was altered"):
        run_job(str(source), tmp_path / "out", settings)


def test_a_lost_or_damaged_plan_of_a_complete_run(tmp_path: Path, settings: JobSettings) -> None:
    """Lost: made again, the audit stays. Its hash is compared whatever else is lost."""
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    out = tmp_path / "out"
    run_job(str(source), out, settings)
    (out / "audit").mkdir()
    (out / "audit" / "summary.json").write_text("{}")
    (out / "plan" / "plan.parquet").unlink()
    run_job(str(source), out, settings)
    assert (out / "plan" / "plan.parquet").exists() and (out / "audit" / "summary.json").exists()
    summary = json.loads((out / "plan" / "summary.json").read_text())
    (out / "plan" / "summary.json").write_text(json.dumps(summary | {"plan_hash": "0" * 64}))
    (out / "plan" / "plan.parquet").unlink()
    with pytest.raises(RunDirectoryError, match="planned differently"):
        run_job(str(source), out, settings)
    (out / "plan" / "summary.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="summary.json is damaged .*; delete it"):
        run_job(str(source), out, settings)
    (out / "plan" / "summary.json").unlink()
    assert run_job(str(source), out, settings).counters["rows_ok"] == 6


def test_a_model_that_cannot_run_leaves_no_folder(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    settings = JobSettings.from_flat({"model": str(model), "max_new_tokens": 2})
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        run_job(str(source), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    (model / "model.safetensors").write_bytes(weights)
    assert run_job(str(source), tmp_path / "out", settings).rows_failed == 0


def test_a_kv_budget_without_room_for_a_prompt_is_refused(
    tmp_path: Path, model_folder: Path
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    settings = JobSettings.from_flat({"model": str(model_folder), "kv_budget": "1KB"})
    with pytest.raises(UsageError, match="--kv-budget"):
        run_job(str(source), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_planning_is_an_interruption(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(job: Any, watch: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.plan_rows", interrupt)
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    with pytest.raises(Interrupted, match="goes on from here"):
        run_job(str(source), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flat", "field"),
    [
        ({"limit": 2}, "limit"),
        ({"seed": 4}, "seed"),
        ({"stop": ["x"]}, "stop"),
        ({"parse_special_tokens": True}, "parse_special_tokens"),
    ],
)
def test_the_changed_setting_is_named_and_not_a_hash_of_it(
    tmp_path: Path, tokenizer_folder: Path, flat: dict[str, Any], field: str
) -> None:
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder))
    with pytest.raises(RunDirectoryError, match=f"another {field} "):
        run_job(str(source), tmp_path / "out", echo_settings(tokenizer_folder, **flat))


def test_too_many_failed_rows_stay_too_many_on_a_second_call(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["a", None, None])
    settings = echo_settings(tokenizer_folder, fail_on_error="1")
    for _ in range(2):
        with pytest.raises(TooManyFailedRows, match="2 of 3"):
            run_job(str(source), tmp_path / "out", settings)
    more = echo_settings(tokenizer_folder, fail_on_error="2")
    assert run_job(str(source), tmp_path / "out", more).was_complete


def test_a_job_reads_its_model_and_its_input_once_to_name_them(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four places asked for the name of the model, and each of them hashed its files."""
    hashed: list[Path] = []
    whole = identity.hash_model_folder

    def count(folder: Path) -> str:
        hashed.append(folder)
        return whole(folder)

    monkeypatch.setattr(identity, "hash_model_folder", count)
    source = write_prompts(tmp_path / "p.parquet", ["a question?", "a question too?"])
    flat = {"model": str(model_folder), "max_new_tokens": 2, "kv_store": str(tmp_path / "kv")}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    assert len(hashed) == 1
