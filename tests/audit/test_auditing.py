"""The audit of whole runs with a tiny model: it passes, it fails, it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_opened, audit_run, describe_audit
from pipeline.audit.gate import seed_of_output
from pipeline.audit.other_arms import Arms
from pipeline.cli.tables import audit_table
from pipeline.engine.verify import arms
from pipeline.errors import CoppiceError, InputError, ModelError, RunDirectoryError, StorageError
from pipeline.job.job import open_job
from pipeline.job.reading import select_rows
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, JobSettings
from pipeline.storage.part_file import write_part
from pipeline.storage.run_directory import RunDirectory
from tests.tiny_job import echo_settings, write_model, write_prompts, write_tokenizer

PROMPTS = [f"answer this question in one word: {w}" for w in ("why?", "who?", "why?", "me or you?")]
EVERY_ROW = AuditSettings(audit_sample="100%")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("audited-model"))


def make_run(folder: Path, model: Path, **flat: object) -> Path:
    prompts = write_prompts(folder / "p.parquet", [*PROMPTS])
    settings = {"model": str(model), "engine": "naive", "max_new_tokens": 6, "dtype": "float32"}
    run_job(str(prompts), folder / "out", JobSettings.from_flat(settings | flat))
    return folder / "out"


@pytest.mark.parametrize("flat", [{}, {"temperature": 1.0}, {"stop": ["a"]}])
def test_an_honest_run_passes(tmp_path: Path, model: Path, flat: dict[str, object]) -> None:
    output = make_run(tmp_path, model, **flat)
    verdict = audit_run(Location(output), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    summary = describe_audit(Location(output))
    assert summary["classes"]["identical"] == (4 if "temperature" in flat else 3)
    assert summary["seed"] == seed_of_output(RunDirectory.open(output))
    rows = pl.read_parquet(output / "audit" / "audit.parquet")
    assert rows["audit_class"].unique().to_list() == ["identical"]


def test_sampled_rows_without_ids_are_replayed_with_their_own_noise(
    tmp_path: Path, model: Path
) -> None:
    pq.write_table(pa.table({"prompt": PROMPTS}), tmp_path / "p.parquet")
    settings = {"model": str(model), "engine": "naive", "max_new_tokens": 6, "temperature": 1.0}
    run_job(str(tmp_path / "p.parquet"), tmp_path / "out", JobSettings.from_flat(settings))
    assert audit_run(Location(tmp_path / "out"), EVERY_ROW).passed
    assert describe_audit(Location(tmp_path / "out"))["classes"]["identical"] == 4


@pytest.mark.parametrize("flat", [{}, {"temperature": 1.0}])
def test_a_run_that_shared_prefixes_is_computed_in_other_ways_too(
    tmp_path: Path, model: Path, flat: dict[str, object]
) -> None:
    output = make_run(tmp_path, model, engine="prefix", **flat)
    verdict = audit_run(Location(output), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    summary = describe_audit(Location(output))
    assert list(summary["arms"]) == ["again", "batched", "reuse", "product"]
    rows = summary["rows_audited"]
    assert all(arm["rows"] == arm["rows_exact"] == rows for arm in summary["arms"].values())
    assert summary["arms"]["again"]["kl_max"] == 0.0 <= summary["arms"]["product"]["kl_max"] < 1e-6
    faults = summary["faults"]
    assert faults["planted"] == 12 and faults["caught"] == faults["changed_an_answer"] > 0
    assert 0 < summary["replay_seconds"] < summary["seconds"]
    kl = pl.read_parquet(output / "audit" / "audit.parquet")["audit_kl"]
    assert kl.max() == summary["arms"]["product"]["kl_max"] and kl.null_count() == 0


def test_a_strict_run_is_held_to_its_bits(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_run(tmp_path, model, engine="prefix", fidelity="strict")
    verdict = audit_run(Location(output), EVERY_ROW)
    assert verdict.passed and verdict.tier == "strict", verdict.reasons
    summary = describe_audit(Location(output))
    assert summary["strict"] == {"rows": 3, "rows_same_bits": 3}
    monkeypatch.setattr(arms, "same_bits_alone", lambda engine, rows: [True, False, True])
    assert not audit_run(Location(output), EVERY_ROW).passed


@pytest.mark.parametrize("fidelity", ["default", "strict"])
def test_int8_is_audited_against_its_own_weights_and_told_beside_the_saved_ones(
    tmp_path: Path, model: Path, fidelity: str
) -> None:
    output = make_run(tmp_path, model, engine="prefix", weights="int8", fidelity=fidelity)
    verdict = audit_run(Location(output), EVERY_ROW)
    assert verdict.passed and verdict.tier == "int8", verdict.reasons
    assert verdict.rows_exact == 3
    summary = describe_audit(Location(output))
    assert summary["strict"]["rows_same_bits"] == (3 if fidelity == "strict" else 0)
    weights = summary["weights"]
    assert weights["rows"] == 3 and 0 < weights["kl_mean"] < 0.05
    assert 0.5 < weights["same_choice"] <= 1
    assert summary["arms"]["product"]["kl_max"] < weights["kl_max"]
    table = " ".join(f"{name}: {text}" for name, text in audit_table(summary))
    assert "int8 weights: " in table and "of tokens as by the weights as saved" in table


def test_weights_as_saved_have_no_figure_of_their_own(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model, engine="prefix")
    audit_run(Location(output), EVERY_ROW)
    assert describe_audit(Location(output))["weights"] is None


def test_an_audit_that_notices_no_fault_fails(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the check: a replay that agrees with whatever it is given."""
    output = make_run(tmp_path, model, engine="prefix")
    monkeypatch.setattr(Arms, "_passes", lambda self, row: True)
    verdict = audit_run(Location(output), EVERY_ROW)
    assert not verdict.passed and "caught 0 of" in verdict.reasons[0]


def test_arms_can_be_left_out(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model, engine="prefix")
    assert audit_run(Location(output), EVERY_ROW.model_copy(update={"audit_arms": 0})).passed
    summary = describe_audit(Location(output))
    assert summary["arms"] == {} and summary["faults"]["planted"] == 0


def test_a_changed_token_is_found(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model, ignore_eos=True)
    (part,) = (output / "data").iterdir()
    table = pq.read_table(part)
    ids = table.column("completion_token_ids").to_pylist()
    ids[1][3] = (ids[1][3] + 7) % 40
    column = table.schema.get_field_index("completion_token_ids")
    field = table.schema.field(column)
    changed = table.set_column(column, field, pa.array(ids, type=field.type))
    part.unlink()
    write_part(output / "data", 0, changed, {})
    verdict = audit_run(Location(output), EVERY_ROW)
    assert not verdict.passed
    rows = pl.read_parquet(output / "audit" / "audit.parquet")
    assert rows.filter(~pl.col("audit_exact"))["audit_first_divergence"].to_list() == [3]


def test_another_input_is_refused(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model)
    write_prompts(tmp_path / "p.parquet", ["something else"])
    with pytest.raises(InputError, match="has changed since"):
        audit_run(Location(output), EVERY_ROW)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    output = make_run(tmp_path, model)
    with (model / "config.json").open("a") as config:
        config.write("\n")
    with pytest.raises(ModelError, match="model differs"):
        audit_run(Location(output), EVERY_ROW)


def test_a_run_that_was_not_audited_says_so(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model)
    with pytest.raises(RunDirectoryError, match="coppice audit"):
        describe_audit(Location(output))


def test_rows_are_found_again_in_input_order(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.parquet", [f"p{i}" for i in range(5000)])
    job = open_job(str(prompts), echo_settings(model))
    batch = select_rows(job, np.array([4999, 0, 2500]))
    assert batch.contents == ["p0", "p2500", "p4999"]
    assert batch.ids == ["r0", "r2500", "r4999"]


def rewrite_a_token(output: Path) -> Path:
    """Change an answer in place; the name, and with it the promised hash, stays."""
    (part,) = (output / "data").iterdir()
    table = pq.read_table(part)
    place = table.column_names.index("completion_token_ids")
    ids = [[2, 3]] * table.num_rows
    pq.write_table(
        table.set_column(place, table.field(place), pa.array(ids, pa.list_(pa.int32()))), part
    )
    return part


def test_an_altered_part_is_named(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model)
    part = rewrite_a_token(output)
    with pytest.raises(StorageError, match=f"{part.name} was altered"):
        audit_run(Location(output), EVERY_ROW)


def test_a_missing_part_is_no_smaller_run(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model, rows_per_part=2)
    sorted((output / "data").iterdir())[0].unlink()
    with pytest.raises(StorageError, match="2 of 4 rows have no answer"):
        audit_run(Location(output), EVERY_ROW)


def test_an_unfinished_run_gets_no_verdict(tmp_path: Path, model: Path) -> None:
    output = make_run(tmp_path, model)
    (output / "_SUCCESS").unlink()
    with pytest.raises(RunDirectoryError, match="not complete"):
        audit_run(Location(output), EVERY_ROW)
    assert not (output / "audit").exists()


OTHER_JOBS: dict[str, tuple[dict[str, object], type[CoppiceError], str]] = {
    "other rows": ({"limit": 2}, InputError, "has changed since"),
    "other sampling": ({"max_new_tokens": 5}, ModelError, "sampling differs"),
    "without an option of the run": ({}, ModelError, "generation_options differs"),
}


@pytest.mark.parametrize("name", OTHER_JOBS)
def test_an_opened_job_that_is_not_of_the_run_is_refused(
    tmp_path: Path, model: Path, name: str
) -> None:
    """The fingerprints are compared both ways: a field that only the run has counts as well."""
    flat, kind, says = OTHER_JOBS[name]
    recorded = {"generation_options": ["repetition_penalty=1.1"]}
    run = make_run(tmp_path, model, **recorded)
    asked = {"model": str(model), "engine": "naive", "max_new_tokens": 6, "dtype": "float32"}
    same = open_job(str(tmp_path / "p.parquet"), JobSettings.from_flat(asked | recorded))
    assert audit_opened(same, Location(run), EVERY_ROW).passed
    own = recorded if flat else {}
    other = open_job(str(tmp_path / "p.parquet"), JobSettings.from_flat(asked | own | flat))
    with pytest.raises(kind, match=says):
        audit_opened(other, Location(run), EVERY_ROW)
