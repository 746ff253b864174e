"""The demo as a newcomer runs it: the command, in a process of its own, on the shipped files."""

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
from pipeline.cli.demo import run_conversations_demo, run_segments_demo
from tests.tiny_job import hide_encoder

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_demo_answers_audits_and_reports(tmp_path: Path, is_whole: bool) -> None:
    """All of it with all threads, and an encoder for the texts that are audited."""
    output = tmp_path / "demo"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    if is_whole:
        environment.pop("OMP_NUM_THREADS")
    else:
        environment["PYTHONPATH"] = hide_encoder(tmp_path / "no_encoder")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "demo", "-o", str(output), "--progress", "plain"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path))
    counters = json.loads((output / "run.json").read_text())["counters"]
    prompts = pl.read_parquet(ROOT / "data" / "prompts.parquet")
    assert counters["rows_in"] == counters["rows_ok"] == len(prompts) >= 2000
    assert counters["prefilled_tokens"] == counters["unique_tokens"]
    assert counters["cached_tokens"] == counters["prompt_tokens"] - counters["unique_tokens"]
    audit = json.loads((output / "audit" / "summary.json").read_text())
    assert audit["verdict"] == "pass" and audit["classes"]["identical"] == audit["rows_audited"]
    assert audit["groups_covered"] == audit["groups_total"] > 100
    assert (audit["similarity"]["encoder"] is not None) == is_whole
    answers = pl.read_parquet(output / "data" / "*.parquet")
    right = (answers["generated_text"].str.strip_chars() == answers["answer"]).mean()
    assert isinstance(right, float) and right >= 0.95
    assert "Audit" in done.stdout and str(output) in "".join(done.stdout.split())
    assert (output / "report.html").stat().st_size > 10_000


def test_the_demo_of_documents_computes_a_twentieth_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_arms, "_FAULT_ROWS", 1)
    run_segments_demo(tmp_path / "demo", "none", "text")
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
    run_conversations_demo(tmp_path / "demo", "none", "text")
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
