"""The audit of conversations that evict nothing: turns against full prefill of all before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, JobSettings
from pipeline.storage.part_file import write_part
from pipeline.storage.run_directory import RunDirectory
from tests.conversation_job import AS_TURNS, Turn, write_turns
from tests.tiny_job import write_model

EVERY_ROW = AuditSettings(audit_sample="100%", audit_free_running=4, audit_arms=6)
WORDS = ["why?", "and then", "no", "go on.", "yes, but when", "a", "hm", "what is it"]
TURNS: list[Turn] = [
    (f"talk {talk}", 3 * turn, f"we talk of {talk // 2}: {WORDS[(talk + turn) % 8]}")
    for turn in range(4)
    for talk in range(5)
    if turn < 5 - talk
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("audited-model"), sharpness=4.0)


def make_run(folder: Path, model: Path, **flat: Any) -> Path:
    source = write_turns(folder / "in.parquet", TURNS)
    said = {"model": str(model), "max_new_tokens": 5, "dtype": "float32", "device": "cpu"}
    settings = JobSettings.from_flat(said | AS_TURNS | flat)
    run_job(str(source), folder / "out", settings)
    return folder / "out"


@pytest.mark.parametrize(
    "flat",
    [{}, {"engine": "naive"}, {"temperature": 1.0}, {"stop": ["a"]}, {"fidelity": "strict"}],
    ids=str,
)
def test_every_turn_of_an_honest_run_is_what_full_prefill_says(
    tmp_path: Path, model: Path, flat: dict[str, Any]
) -> None:
    output = make_run(tmp_path, model, **flat)
    verdict = audit_run(Location(output), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    summary = describe_audit(Location(output))
    assert summary["classes"]["identical"] == summary["rows_audited"] == len(TURNS)
    assert summary["free_running"]["unexplained"] == 0
    if "engine" not in flat:
        faults = summary["faults"]
        assert faults["planted"] and faults["caught"] == faults["changed_an_answer"] > 0
        assert all(arm["rows_exact"] == arm["rows"] > 0 for arm in summary["arms"].values())


@pytest.mark.parametrize(
    ("more", "most"),
    [
        ({"max_new_tokens": 8}, 128),
        ({"generation_options": {"max_length": 90}}, 90),
    ],
    ids=["window", "max_length"],
)
def test_an_answer_near_the_end_of_the_window_is_not_called_too_short(
    tmp_path: Path, model: Path, more: dict[str, Any], most: int
) -> None:
    """It has what was left of 128 tokens, or of those that the model's `max_length` says."""
    turns: list[Turn] = [("a", n, "so i say once more, go on") for n in range(5)]
    source = write_turns(tmp_path / "in.parquet", turns)
    said = {"model": str(model), "dtype": "float32", "fail_on_error": "99%"} | more
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(said | AS_TURNS))
    rows = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")
    used = (rows["prompt_tokens"] + rows["completion_tokens"]).max()
    assert used == most and "ContextExceeded" in rows["error_type"].to_list()
    verdict = audit_run(Location(tmp_path / "out"), EVERY_ROW)
    assert verdict.passed, verdict.reasons


def tampered(output: Path, row: int) -> None:
    """One token of the answer of `row` is another one, as if the KV of its history were wrong."""
    (part,) = (output / "data").iterdir()
    rows = pl.read_parquet(part)
    ids = rows.sort("row_index")["completion_token_ids"].to_list()
    ids[row] = [5 if ids[row][0] != 5 else 6, *ids[row][1:]]
    changed = rows.sort("row_index").with_columns(
        completion_token_ids=pl.Series(ids, dtype=pl.List(pl.Int32))
    )
    with RunDirectory.create_or_resume(
        output, RunDirectory.open(output).read_manifest()["fingerprint"], {}
    ) as run:
        schema = pq.read_schema(part)
        part.unlink()
        table = changed.to_arrow().cast(schema.remove_metadata())
        write_part(output / "data", 0, table, {"run_id": run.run_id})
        (output / "_SUCCESS").write_text("\n".join(run.part_names()))


def test_a_turn_that_does_not_follow_from_its_history_is_found(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model, rows_per_part=100)
    tampered(output, 5)
    verdict = audit_run(Location(output), EVERY_ROW)
    assert not verdict.passed
    rows = pl.read_parquet(output / "audit" / "audit.parquet")
    bad = rows.filter(~pl.col("audit_exact"))["row_index"].to_list()
    assert 5 in bad
    later = {row for row, turn in enumerate(TURNS) if turn[0] == TURNS[5][0] and turn[1] > 3}
    assert set(bad) <= {5} | later, "a turn is judged by what is committed before it"
