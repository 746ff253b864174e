"""Answers of a form where rows are more than plain prompts: thinking, turns, documents, fleets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM

from pipeline.audit.auditing import audit_run
from pipeline.engine.base import RunControl
from pipeline.executor.fleet import Fleet
from pipeline.inputs.conversion import convert
from pipeline.job.planning import plan_rows
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.location import Location
from pipeline.run import plan_job, run_job
from pipeline.settings import AuditSettings, JobSettings
from tests.engine.automata import Automata
from tests.engine.test_guides import check_words, random_plan
from tests.executor.test_fleet import fleet_of, tiny_engine
from tests.test_structured import DEMO, LABEL, PROMPTS, check_all, settings_of
from tests.tiny_job import answers, write_model, write_prompts

__all__ = ["fleet_of"]
FULL = AuditSettings(audit_sample="100%", audit_free_running=2, audit_arms=3)


def write_thinker(folder: Path) -> Path:
    """A model of characters that knows two tags more."""
    write_model(folder, sharpness=3.0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokenizer.get_vocab_size())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_a_form_begins_after_thinking_that_ends_within_its_budget(
    tmp_path: Path, engine: str
) -> None:
    model = write_thinker(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.parquet", ["is it so? <think>", "why? <think>", "hm"])
    flat = {"regex": "(yes|no), [a-c]{2}", "thinking_budget": 4, "max_new_tokens": 30}
    settings = settings_of(model=str(model), engine=engine, parse_special_tokens=True, **flat)
    run_job(str(prompts), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok"] * 3
    assert set(rows["finish_reason"]) == {"stop"}
    for text in rows["generated_text"][:2]:
        thought, _, said = text.partition("</think>")
        assert len(thought) <= 4 and said[:2] in ("ye", "no") and said[-4:-2] == ", "
    assert audit_run(Location(tmp_path / "out"), FULL).passed


def test_turns_are_held_to_the_schema_one_by_one(tmp_path: Path) -> None:
    rows = [(f"c{i % 3}", i // 3, PROMPTS[i]) for i in range(9)]
    names, turns, prompts = zip(*rows, strict=True)
    table = pa.table({"conversation_id": names, "turn": turns, "prompt": prompts})
    pq.write_table(table, tmp_path / "p.parquet")
    job = settings_of(json_schema=LABEL, conversation_column="conversation_id")
    run_job(str(tmp_path / "p.parquet"), tmp_path / "out", job)
    found = answers(tmp_path / "out")
    assert set(found["finish_reason"]) == {"stop"}
    assert set(found["forced_tokens"]) == {0}
    check_all(found)
    assert found["parsed"].null_count() == 0
    assert audit_run(Location(tmp_path / "out"), FULL).passed


@pytest.mark.parametrize("reuse", ["prefix", "concat", "cacheblend"])
def test_rows_with_documents_have_openings_too(tmp_path: Path, reuse: str) -> None:
    documents = [[f"Plum {j} is {'red' if j % 2 else 'blue'}. " * 4 for j in (i % 3, i % 4)]
                 for i in range(8)]  # fmt: skip
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:8], documents=documents)
    flat: dict[str, Any] = {"reuse": reuse} if reuse != "prefix" else {"document_order": "best"}
    job = settings_of(
        json_schema=LABEL, calibration_rows=0, documents_column="documents",
        prompt_column="prompt", **flat,
    )  # fmt: skip
    run_job(str(prompts), tmp_path / "out", job)
    found = answers(tmp_path / "out")
    assert set(found["finish_reason"]) == {"stop"}
    assert (found["forced_tokens"] > 0).all()
    check_all(found)
    assert audit_run(Location(tmp_path / "out"), FULL).passed


@pytest.mark.parametrize("workers", [1, 3])
def test_a_fleet_holds_to_grammars_as_one_engine_does(
    fleet_of: Callable[..., Fleet],  # noqa: F811
    workers: int,
) -> None:
    plan, every = random_plan(6, rows=40), np.arange(40)
    every = every[: len(plan.sequences)]
    control = RunControl(grammars=Automata())
    fleet = fleet_of(workers)
    alone = {c.sequence: c for c in tiny_engine().generate(plan, every, control)}
    found = {c.sequence: c for c in fleet.generate(plan, every, control)}
    check_words(plan, found)
    assert {s: c.token_ids for s, c in found.items()} == {s: c.token_ids for s, c in alone.items()}
    assert fleet.counters.forced_tokens == sum(c.forced_tokens for c in found.values())


def test_a_batch_file_asks_by_response_format(tmp_path: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "label", "schema": LABEL}}
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": "m", "prompt": PROMPTS[i], "max_tokens": 40, "response_format": kind}}
        for i, kind in enumerate([form, {"type": "json_object"}, {"type": "text"}, {"type": "x"}])
    ]  # fmt: skip
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run_job(str(path), tmp_path / "out", settings_of())
    rows = answers(tmp_path / "out").to_dicts()
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "error"]
    assert json.loads(rows[0]["parsed"]).keys() == LABEL["properties"].keys()
    assert rows[1]["generated_text"].startswith("{") and rows[2]["parsed"] is None
    assert "response_format must be" in rows[3]["error_message"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:3]))
    convert(Location(str(path)), Location(str(tmp_path / "t.parquet")), False)
    convert(Location(str(tmp_path / "t.parquet")), Location(str(tmp_path / "b.jsonl")), False)
    again = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert again[0]["body"]["response_format"]["json_schema"]["schema"] == LABEL
    assert again[1]["body"]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "response_format" not in again[2]["body"]


def test_openings_come_back_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "every_rows", 6)
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    settings = settings_of(json_schema=LABEL)
    job = plan_job(str(prompts), settings).job
    first = plan_rows(job, keep_rows=True)
    again = plan_rows(job)
    assert first.plan.params == again.plan.params
    assert again.opening(0) == first.opening(0) != ()


def test_rows_of_their_own_schemas_are_one_job(tmp_path: Path) -> None:
    """40 schemas, each compiled once for all of its rows."""
    schemas = [json.dumps({"type": "object", "properties": {f"f{i % 40}": {"type": "boolean"}},
                           "required": [f"f{i % 40}"]}) for i in range(80)]  # fmt: skip
    prompts = write_prompts(tmp_path / "p.parquet", [PROMPTS[i % 18] for i in range(80)],
                            form=schemas)  # fmt: skip
    run_job(str(prompts), tmp_path / "out", settings_of(json_schema_column="form"))
    rows = answers(tmp_path / "out")
    for i, row in enumerate(rows.iter_rows(named=True)):
        assert list(json.loads(row["parsed"])) == [f"f{i % 40}"]


def test_the_demo_has_no_column_of_forms(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS[:2])
    settings = JobSettings.from_flat({"model": str(DEMO), "max_new_tokens": 4})
    run_job(str(prompts), tmp_path / "out", settings)
    assert not {"parsed", "forced_tokens"} & set(pl.read_parquet_schema(
        next((tmp_path / "out" / "data").glob("*.parquet"))
    ))  # fmt: skip
