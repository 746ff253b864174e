"""`coppice recycle experiment` and `build`, all of them but small; calls that cannot work."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import (
    CoppiceError,
    EngineError,
    FolderInUse,
    InputError,
    ModelError,
    UsageError,
)
from pipeline.experiment.decode import GreedyDecoder
from pipeline.experiment.depth import DepthSettings, study_depth
from pipeline.experiment.protocol import Protocol
from pipeline.experiment.subjects import Sizes, timing_subject
from pipeline.storage.lock import LOCK_NAME, FolderLock
from tests.tiny_job import write_prompts

pytestmark = pytest.mark.usefixtures("one_encoder")
EXPERIMENT = (
    "recycle",
    "experiment",
    "--quick",
    "--repeats",
    "1",
    "--depth-repeats",
    "2",
    "--warmups",
    "0",
)


def coppice(*arguments: str | Path) -> str:
    """Run a command in this process; what it prints. Raises its error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.stdout


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "results"
    page = coppice(*EXPERIMENT, "-o", folder)
    assert page == (folder / "summary.md").read_text()
    return folder


def test_it_writes_tables_pictures_and_a_summary_and_nothing_else(results: Path) -> None:
    tables = {"baseline.csv", "recycled.csv", "comparison.csv", "depth.csv", "neighbours.csv"}
    others = {"summary.json", "summary.md", "depth.png", "neighbours.png"}
    assert {path.name for path in results.iterdir()} == tables | others | {LOCK_NAME}


def test_every_recycled_row_is_identical_and_no_naive_one_is(results: Path) -> None:
    rows = read(results / "recycled.csv")
    ours = [row for row in rows if row["arm"] != "naive-paper"]
    naive = [row for row in rows if row["arm"] == "naive-paper"]
    assert {row["identical"] for row in ours} == {"True"}
    assert {float(row["token_similarity"]) for row in ours} == {1.0}
    assert {row["output_similarity"] for row in ours} == {"1.0", ""}  # none of random words
    assert len(naive) >= 8
    assert {row["identical"] for row in naive} == {"False"}
    assert {row["route"] for row in naive} == {"generate", "emulated"}


def test_only_whole_prompts_are_reused_by_embedding_and_any_depth_by_the_tree(
    results: Path,
) -> None:
    rows = read(results / "recycled.csv")
    kinds = {(r["arm"], r["kind"]): int(r["reused_tokens"]) > 0 for r in rows}
    assert kinds["embedding", "extends"] and kinds["embedding", "exact"]
    assert not kinds["embedding", "diverges"] and kinds["tree", "diverges"]
    assert not kinds["embedding", "miss"] and not kinds["tree", "miss"]
    assert all(int(r["reused_tokens"]) < int(r["prompt_tokens"]) for r in rows)


def test_the_embedded_model_answers_right_with_reuse_and_wrong_in_the_papers_way(
    results: Path,
) -> None:
    arms = {
        arm["arm"]: arm
        for arm in json.loads((results / "summary.json").read_text())["models"][0]["arms"]
    }
    assert arms["embedding"]["right_answers"] == arms["tree"]["right_answers"] == "5 of 5"
    assert arms["naive-paper"]["right_answers"] == "0 of 5"
    assert arms["naive-paper"]["output_similarity"] < 0.9


def test_the_summary_adds_up(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    rows = read(results / "comparison.csv")
    for model in summary["models"]:
        for arm in model["arms"]:
            found = [r for r in rows if (r["model"], r["arm"]) == (model["name"], arm["arm"])]
            hits = [r for r in found if int(r["reused_tokens"])]
            assert arm["hits"] == len(hits)
            assert arm["reused_tokens"] == sum(int(r["reused_tokens"]) for r in hits)
            speedups = [float(r["speedup_percent"]) for r in hits]
            assert arm["speedup_with_cache"] == pytest.approx(np.mean(speedups))
    assert (summary["paper"]["output_similarity"], summary["paper"]["reused_tokens"]) == (0.594, 38)


def test_depths_are_those_asked_for(results: Path) -> None:
    rows = read(results / "depth.csv")
    depths = [int(row["depth"]) for row in rows if row["state"] == "warm"]
    assert tuple(depths) == Sizes.quick().depth.depths
    assert [row["state"] for row in rows].count("cold") == 1
    for row in rows:
        faster = float(row["baseline_s"]) / float(row["latency_s"])
        assert float(row["ratio"]) == pytest.approx(faster)


@pytest.mark.fault(
    "recycled KV that is another prompt's, in the experiment",
    injected="KV of every kept prompt shifted by one position",
    outcome="the command fails with exit code 1, names prompt and token, and writes no table",
)
def test_kv_that_changes_a_token_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: with `check_answers` left out."""
    right = GreedyDecoder.compute_kv

    def shifted(self: GreedyDecoder, token_ids: list[int]) -> Tensor:
        return torch.roll(right(self, token_ids), 1, dims=3)

    monkeypatch.setattr(GreedyDecoder, "compute_kv", shifted)
    with pytest.raises(EngineError, match=r"prompt t\d+: arm .* differs .* at new token") as caught:
        coppice(*EXPERIMENT, "-o", tmp_path / "results")
    assert caught.value.exit_code == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == [LOCK_NAME]


def csv_file(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(("id,text", *rows)) + "\n")
    return path


@pytest.mark.fault(
    "recycling experiment called with what cannot work",
    injected="no prompts, one longer than the context, none short enough, unknown model, folder",
    outcome="one sentence that names it, exit code 2, nothing written",
)
@pytest.mark.parametrize(
    ("flag", "rows", "error", "reason"),
    [
        ("--cache-prompts", [], InputError, "holds no prompts"),
        ("--test-prompts", ["a," + "word " * 2000], InputError, "does not fit the 1024"),
        ("--cache-prompts", ["a," + "word " * 300], InputError, "no prompt has at most 64 tokens"),
        ("--model", None, ModelError, "no such model folder|there is no model folder"),
        ("--workloads", None, UsageError, "check --workloads"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, flag: str, rows: list[str] | None, error: type[CoppiceError], reason: str
) -> None:
    place = tmp_path / "given"
    value = place if rows is None else csv_file(place.with_suffix(".csv"), *rows)
    with pytest.raises(error, match=reason) as caught:
        coppice(*EXPERIMENT, "-o", tmp_path / "results", flag, value)
    assert caught.value.exit_code == 2
    assert not list((tmp_path / "results").glob("[!.]*"))


def test_one_run_at_a_time_and_a_dead_ones_stores_go(tmp_path: Path) -> None:
    """Seen red: without the lock, and without removing what lay there."""
    (tmp_path / ".stores-dead" / "0").mkdir(parents=True)
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUse, match="is in use"):
        coppice(*EXPERIMENT, "-o", tmp_path)
    assert (tmp_path / ".stores-dead").exists()
    lock.release()
    with pytest.raises(ModelError):
        coppice(*EXPERIMENT, "-o", tmp_path, "--model", tmp_path / "none")
    assert not (tmp_path / ".stores-dead").exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_dialogpt_is_taken_from_the_hubs_cache_and_never_fetched(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """As safetensors, that is. Seen red: asking for config.json alone."""
    cached = {name: str(model_folder / name) for name in ("config.json", weights)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file: cached.get(file))
    subject, note = timing_subject(None, str(model_folder), Sizes.quick())
    if weights == "model.safetensors":
        assert (subject.name, note[:12]) == ("microsoft/DialoGPT-medium", "Real weights")
    else:
        assert "random weights" in subject.name and "Timing only" in note


def test_a_model_too_small_for_the_depths_is_refused(tmp_path: Path, model_folder: Path) -> None:
    """125 prompt tokens and 4 new ones, and 128 positions."""
    subject, _ = timing_subject(str(model_folder), "", Sizes.quick())
    with pytest.raises(ModelError, match="holds 128 tokens, .* name another --model"):
        study_depth(subject, DepthSettings(prompt_tokens=125), Protocol(1, 0), tmp_path)


def run_job(prompts: Path, output: Path, model: Path, *flags: str | Path) -> list[dict[str, Any]]:
    coppice(
        "run", prompts, "-o", output, "--model", model, "--max-new-tokens", "4",
        "--dtype", "float32", "--progress", "none", *flags,
    )  # fmt: skip
    return pl.read_parquet(output / "data" / "*.parquet").sort("id").to_dicts()


def test_a_job_finds_the_states_that_build_kept(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says the same as without them. Seen red: build with another dtype than the job's."""
    monkeypatch.setattr("pipeline.job.recycling.least_depth", lambda *_: 1)  # else by the clock
    shared = "the quick brown fox jumps over the lazy dog and then sleeps. "
    kept = csv_file(tmp_path / "kept.csv", f"a,{shared}")
    store = tmp_path / "store"
    said = coppice(
        "recycle", "build", kept, "--model", model_folder, "--kv-store", store,
        "--dtype", "float32", "--json", "--progress", "none",
    )  # fmt: skip
    built = json.loads(said)
    assert (built["prompts"], built["stored"], built["refused"]) == (1, 1, 0)
    prompts = write_prompts(tmp_path / "p.parquet", [shared + end for end in ("one", "two")])
    alone = run_job(prompts, tmp_path / "alone", model_folder)
    found = run_job(prompts, tmp_path / "found", model_folder, "--kv-store", store)
    assert [row["generated_text"] for row in found] == [row["generated_text"] for row in alone]
    assert "store" in {row["reuse_source"] for row in found}


def test_building_again_computes_nothing(tmp_path: Path, model_folder: Path) -> None:
    kept = csv_file(tmp_path / "kept.csv", "a,one two three", "b,one two four")
    call = ("recycle", "build", kept, "--model", model_folder, "--kv-store", tmp_path / "store")
    first, again = (json.loads(coppice(*call, "--json", "--progress", "none")) for _ in range(2))
    assert (first["stored"], again["stored"], again["refused"], again["tokens"]) == (2, 0, 2, 0)


def test_a_prompt_longer_than_the_context_is_not_built(tmp_path: Path, model_folder: Path) -> None:
    kept = csv_file(tmp_path / "kept.csv", "a," + "word " * 3000)
    call = ("recycle", "build", kept, "--model", model_folder, "--kv-store", tmp_path / "store")
    with pytest.raises(InputError, match="prompt a has .* tokens, the model holds"):
        coppice(*call)
    assert not (tmp_path / "store").exists()
