"""Whole jobs on inputs that are strange, huge or somebody else's, and what becomes of each row."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RunDirectoryError, StorageError
from pipeline.plan.token_table import TokenFile
from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, echo_settings, write_model, write_prompts
from tests.tokens.conftest import save_tokenizer

SYSTEM = "you are a patient teacher of many years"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.fault(
    "null, empty, whitespace prompts",
    injected="rows with null, '', ' ' and a line break, through a whole run",
    outcome="NullPrompt and EmptyPrompt rows; white space is a prompt like any other",
)
def test_null_and_empty_prompts_are_rows_with_a_reason(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", [None, "", " ", "\n", "ok"])
    flat = settings.write.model_copy(update={"fail_on_error": "2"})
    run_job(str(source), tmp_path / "out", settings.model_copy(update={"write": flat}))
    rows = answers(tmp_path / "out")
    assert rows["error_type"].to_list() == ["NullPrompt", "EmptyPrompt", None, None, None]
    assert rows["generated_text"].to_list() == [None, None, " ", "\n", "ko"]
    assert rows["prompt"].to_list() == [None, "", " ", "\n", "ok"]


STRANGE = {
    "NUL": "a\0b",
    "emoji": "🌲👩‍👩‍👧‍👦 forest",
    "bidi": "abc \u202edef\u202c \u2066ghi\u2069",
    "combining": "e\u0301" * 9,
    "private": "\U000f0000\uffff\ufeff",
}


@pytest.mark.fault(
    "NUL", injected="a NUL in a prompt, through a whole run", outcome="answered, carried unchanged"
)
@pytest.mark.fault(
    "emoji", injected="joined emoji, through a whole run", outcome="answered, carried unchanged"
)
@pytest.mark.fault(
    "bidi characters",
    injected="overrides and isolates, through a whole run",
    outcome="answered, carried unchanged",
)
def test_strange_characters_come_through_unchanged(tmp_path: Path) -> None:
    """The echo engine says the ids of the prompt backwards, so each of them was in the plan."""
    model = save_tokenizer(tmp_path / "model")
    source = write_prompts(tmp_path / "p.parquet", [*STRANGE.values()])
    run_job(str(source), tmp_path / "out", echo_settings(model, max_new_tokens=1000))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok"] * len(STRANGE)
    assert rows["prompt"].to_list() == [*STRANGE.values()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for ids, prompt in zip(rows["completion_token_ids"], STRANGE.values(), strict=True):
        assert tokenizer.decode(ids.to_list()[::-1], skip_special_tokens=True) == prompt


@pytest.mark.fault(
    "two tenants, one prefix",
    injected="equal prompts and system prompt for two tenants, a third row without one",
    outcome="no row reuses another tenant's tokens: depths, cached tokens and answers are those of "
    "a run of that tenant alone, and no group has rows of two",
)
def test_tenants_share_nothing_not_even_the_system_prompt(
    tmp_path: Path, model_folder: Path
) -> None:
    """Seen red: with one tenant number for all (reuse across, groups of two tenants)."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(CHAT)
    prompts = ["where is the lamp?", "where is the desk?", "where is the lamp?", "so what"]
    tenants: list[str | None] = ["a", "b", None]
    flat: dict[str, Any] = {
        "model": str(model), "apply_chat_template": True, "system_prompt": SYSTEM,
        "max_new_tokens": 4, "dtype": "float32", "device": "cpu", "min_prefix_tokens": 4,
    }  # fmt: skip
    settings = JobSettings.from_flat(flat)

    def run(name: str, chosen: list[str | None]) -> pl.DataFrame:
        source = write_prompts(
            tmp_path / f"{name}.parquet",
            prompts * len(chosen),
            tenant=pa.array([t for t in chosen for _ in prompts], pa.string()),
        )
        run_job(str(source), tmp_path / name, settings)
        return answers(tmp_path / name)

    together = run("together", tenants)
    alone = run("alone", [None])
    assert alone["cached_tokens"].sum() > 0
    groups: list[set[int]] = []
    for number in range(len(tenants)):
        own = together.slice(number * len(prompts), len(prompts))
        for column in ("reuse_depth", "cached_tokens", "completion_token_ids"):
            assert own[column].to_list() == alone[column].to_list(), column
        groups.append(set(own["group_id"].drop_nulls().to_list()))
        ids = set(own["id"].to_list())
        assert set(own["dedup_of"].drop_nulls().to_list()) <= ids
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups))


@pytest.mark.fault(
    "two tenants, one prefix",
    injected="one row for each of two tenants, the same prompt",
    outcome="reuse_depth 0 and cached_tokens 0 in both, no duplicate",
)
def test_two_rows_of_two_tenants_reuse_nothing(tmp_path: Path, model_folder: Path) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["the same words"] * 2, tenant=["a", "b"])
    flat = {"model": str(model_folder), "max_new_tokens": 3, "device": "cpu"}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    rows = answers(tmp_path / "out")
    assert rows["reuse_depth"].to_list() == rows["cached_tokens"].to_list() == [0, 0]
    assert rows["dedup_of"].to_list() == rows["group_id"].to_list() == [None, None]


def test_group_ids_of_tenants_count_nothing_and_still_join_the_plan(
    tmp_path: Path, model_folder: Path
) -> None:
    """Seen red: node numbers, which grow with the trees of the tenants before."""
    prompts = [f"the same long words and {n}" for n in range(4)] * 2
    source = write_prompts(tmp_path / "p.parquet", prompts, tenant=list("aaaabbbb"))
    flat = {"model": str(model_folder), "max_new_tokens": 3, "device": "cpu"}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    rows = answers(tmp_path / "out").sort("row_index")
    groups = rows["group_id"].unique().to_list()
    assert len(groups) == 2 and all(group > 1 << 40 for group in groups)
    plan = pl.read_parquet(tmp_path / "out" / "plan" / "plan.parquet").sort("row_index")
    assert plan["group_id"].to_list() == rows["group_id"].to_list()


@pytest.mark.fault(
    "model changed between runs",
    injected="other weights in the same folder before the same command",
    outcome="RunDirectoryError naming the field, exit code 2; the parts stay",
)
@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json"])
def test_another_model_in_the_same_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Seen red: with a fingerprint of names and sizes (changed weights were taken)."""
    model = write_model(tmp_path / "model")
    source = write_prompts(tmp_path / "p.parquet", ["hello"])
    settings = JobSettings.from_flat({"model": str(model), "engine": "echo", "max_new_tokens": 2})
    run_job(str(source), tmp_path / "out", settings)
    before = sorted((tmp_path / "out" / "data").iterdir())
    content = bytearray((model / name).read_bytes())
    if name == "model.safetensors":
        content[-1] ^= 1
    else:
        content += b"\n"
    (model / name).write_bytes(content)
    with pytest.raises(RunDirectoryError, match="another model") as refused:
        run_job(str(source), tmp_path / "out", settings)
    assert refused.value.exit_code == 2
    assert sorted((tmp_path / "out" / "data").iterdir()) == before


@pytest.mark.fault(
    "disk full or EIO",
    injected="no room for the temporary file of token ids",
    outcome="StorageError that names TMPDIR, exit code 1; nothing is left behind",
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_without_room_for_token_ids_is_named(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(code, "no room")

    monkeypatch.setattr(TokenFile, "append", fail)
    source = write_prompts(tmp_path / "p.parquet", ["hello"])
    with pytest.raises(StorageError, match=r"token ids on disk \(no room\).*TMPDIR") as failed:
        run_job(str(source), tmp_path / "out", settings)
    assert failed.value.exit_code == 1 and not (tmp_path / "out").exists()


def million_rows(path: Path, rows: int) -> Path:
    """Rows that share 40 characters and differ in the last six, in row groups of 100,000."""
    with pq.ParquetWriter(path, pa.schema({"prompt": pa.string()})) as writer:
        for low in range(0, rows, 100_000):
            numbers = np.arange(low, min(low + 100_000, rows)).astype(str)
            texts = np.char.add("the instructions that all rows have: ", np.char.zfill(numbers, 6))
            writer.write_table(pa.table({"prompt": texts}))
    return path


def check_one_prefix(tmp_path: Path, settings: JobSettings, rows: int) -> None:
    """Planned as one tree of digits below one prefix, and every row answered once."""
    source = million_rows(tmp_path / "p.parquet", rows)
    summary = plan_job(str(source), settings).summary
    digits = sum(-(-rows // 10**below) for below in range(6))  # distinct beginnings of numbers
    assert (summary.rows, summary.unique_tokens) == (rows, 37 + digits)
    outcome = run_job(str(source), tmp_path / "out", settings)
    assert outcome.counters["rows_ok"] == rows
    found = pl.scan_parquet(tmp_path / "out" / "data" / "*.parquet").select(
        pl.len(),
        pl.col("row_index").n_unique().alias("rows"),
        pl.col("id").n_unique().alias("ids"),
        pl.col("generated_text").str.reverse().cast(pl.Int64).eq(pl.col("row_index")).all(),
    )
    assert found.collect().row(0) == (rows, rows, rows, True)


def one_prefix_settings(tokenizer: Path) -> JobSettings:
    return echo_settings(tokenizer, max_new_tokens=6, rows_per_part=50_000)


def test_ten_thousand_rows_under_one_prefix(tmp_path: Path, tokenizer_folder: Path) -> None:
    check_one_prefix(tmp_path, one_prefix_settings(tokenizer_folder), 10_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(
    "a million rows under one prefix",
    injected="1,000,000 rows that share 37 tokens, planned and run by the echo engine (slow test)",
    outcome="one tree of 37 + 1,111,110 tokens, every row answered once",
)
def test_a_million_rows_under_one_prefix(tmp_path: Path, tokenizer_folder: Path) -> None:
    check_one_prefix(tmp_path, one_prefix_settings(tokenizer_folder), 10**6)
