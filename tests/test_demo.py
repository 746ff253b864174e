"""The demos on the shipped files; in full, as a newcomer runs them, in the slow suite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline.audit import other_arms
from pipeline.cli import demo

pytestmark = pytest.mark.usefixtures("pictures")
ROOT = Path(__file__).resolve().parents[1]


def check(output: Path, said: str, rows: int, groups: int) -> None:
    """A demo of so many rows, and of more groups."""
    counters = json.loads((output / "run.json").read_text())["counters"]
    assert counters["rows_in"] == counters["rows_ok"] == rows
    assert counters["prefilled_tokens"] == counters["unique_tokens"]
    assert counters["cached_tokens"] == counters["prompt_tokens"] - counters["unique_tokens"]
    audit = json.loads((output / "audit" / "summary.json").read_text())
    assert audit["verdict"] == "pass" and audit["classes"]["identical"] == audit["rows_audited"]
    assert audit["groups_covered"] == audit["groups_total"] > groups
    answers = pl.read_parquet(output / "data" / "*.parquet")
    right = (answers["generated_text"].str.strip_chars() == answers["answer"]).mean()
    assert isinstance(right, float) and right >= 0.95
    assert "Audit" in said and str(output) in "".join(said.split())
    assert (output / "report.html").stat().st_size > 10_000


def test_the_demo_answers_audits_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 400 of its prompts, in this process."""
    (tmp_path / "demo_model").symlink_to(ROOT / "data" / "demo_model")
    prompts = pl.read_parquet(ROOT / "data" / "prompts.parquet").head(400)
    prompts.write_parquet(tmp_path / "prompts.parquet")
    monkeypatch.setattr(demo, "demo_folder", lambda: tmp_path)
    demo.run_demo(tmp_path / "demo", "none", "text")
    check(tmp_path / "demo", capsys.readouterr().out, 400, 20)


@pytest.mark.slow
def test_the_command_runs_all_of_the_demo(tmp_path: Path) -> None:
    """With all threads, and an encoder for the texts that are audited."""
    output = tmp_path / "demo"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    environment.pop("OMP_NUM_THREADS")  # that of the other tests
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "demo", "-o", str(output), "--progress", "plain"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path))
    rows = len(pl.read_parquet(ROOT / "data" / "prompts.parquet"))
    assert rows >= 2000
    check(output, done.stdout, rows, 100)


def test_the_demo_of_documents_computes_a_twentieth_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_arms, "_FAULT_ROWS", 1)
    demo.run_segments_demo(tmp_path / "demo", "none", "text")
    counters = [
        json.loads((tmp_path / "demo" / mode / "run.json").read_text())["counters"]
        for mode in ("prefix", "concat")
    ]
    prefix, concat = (each["prefilled_tokens"] for each in counters)
    assert counters[0]["unique_tokens"] == prefix > 10 * concat == 10 * counters[1]["unique_tokens"]
    said = dict(re.findall(r"^(\w+ answers) +(.+?) *$", capsys.readouterr().out, re.MULTILINE))
    assert said["same answers"] == "100.0%" and said["right answers"] == "99.5% / 99.5%"


def test_the_demo_of_conversations_computes_new_tokens_alone_and_tells_what_each_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_arms, "_FAULT_ROWS", 1)  # whole conversations again for each fault
    demo.run_conversations_demo(tmp_path / "demo", "none", "text")
    for evictor in ("sink-recent", "gist-recent"):
        counters = json.loads((tmp_path / "demo" / evictor / "run.json").read_text())["counters"]
        assert counters["rows_ok"] == 488
        assert counters["prompt_tokens"] > 10 * counters["prefilled_tokens"]
    said = dict(re.findall(r"^right, ([\w ]+?)  +(.+?) *$", capsys.readouterr().out, re.MULTILINE))
    first, recent = (
        [float(share) for share in re.findall(r"[\d.]+", said[kind])]
        for kind in ("first turn", "last two")
    )
    assert first[0] < 40 and first[1] > 95 and min(recent) > 95
