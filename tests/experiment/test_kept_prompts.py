"""Prompts of the experiment: the two files that come along, and files that cannot work."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import InputError
from pipeline.experiment.kept_prompts import read_kept_prompts
from pipeline.experiment.subjects import encode_texts
from pipeline.prompt_settings import TokenSettings
from pipeline.tokens.tokenizer import PromptTokenizer

DATA = Path(__file__).resolve().parents[2] / "data"


def test_the_files_hold_hits_near_misses_and_misses() -> None:
    cached = read_kept_prompts(DATA / "cache_prompts.csv")
    asked = read_kept_prompts(DATA / "test_prompts.csv")
    assert len(cached) >= 10 and len(asked) >= 6
    kinds = Counter(prompt.kind for prompt in asked)
    assert set(kinds) == {"exact", "extends", "diverges", "paraphrase", "miss"}
    assert sum(bool(prompt.answer) for prompt in asked) >= 6


def test_each_kind_is_what_it_says_in_token_ids() -> None:
    """Seen red: a cached text that ends inside of a token of the test prompt."""
    cached = read_kept_prompts(DATA / "cache_prompts.csv")
    asked = read_kept_prompts(DATA / "test_prompts.csv")
    tokenizer = PromptTokenizer.load(str(DATA / "demo_model"), None, TokenSettings())
    kept = [ids.tolist() for ids in encode_texts(tokenizer, [p.text for p in cached])]
    for prompt, ids in zip(asked, encode_texts(tokenizer, [p.text for p in asked]), strict=True):
        whole = [one for one in kept if ids.tolist()[: len(one)] == one]
        assert bool(whole) == (prompt.kind in ("exact", "extends")), prompt.id
        assert (ids.tolist() in kept) == (prompt.kind == "exact"), prompt.id


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    import subprocess

    script = DATA / "make_paper_prompts.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True)
    for name in ("cache_prompts.csv", "test_prompts.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


BAD = {
    "holds no prompts": b"id,text\n",
    "no column 'prompt'": b"id,question\na,b\n",
    "no column 'id'": b"",
    "more or fewer cells": b"id,text\na,b,c\n",
    "is empty": b"id,text\na,  \n",
    "occurs twice": b"id,text\na,b\na,c\n",
    "not UTF-8": b"id,text\na,\xff\xfe\n",
    "is not CSV": b'id,text\na,"b\n',
}


@pytest.mark.fault(
    "CSV of prompts to keep: empty, no such column, torn row, not UTF-8, ids twice",
    injected="eight files",
    outcome="refused with a sentence that names the file, exit code 2",
)
@pytest.mark.parametrize("reason", BAD)
def test_a_file_that_cannot_work_is_refused(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(BAD[reason])
    with pytest.raises(InputError, match=reason) as caught:
        read_kept_prompts(path)
    assert "p.csv" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_kept_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_csv_names_its_texts_as_a_job_does(tmp_path: Path, column: str) -> None:
    """Seen red: `run` wants `prompt`, and `recycle build` wanted `text`."""
    (tmp_path / "p.csv").write_text(f"id,{column}\na,hello\n")
    assert [(p.id, p.text) for p in read_kept_prompts(tmp_path / "p.csv")] == [("a", "hello")]


def test_parquet_of_a_job_is_read_too(tmp_path: Path) -> None:
    pl.DataFrame({"id": ["a"], "prompt": ["text"]}).write_parquet(tmp_path / "p.parquet")
    assert [(p.id, p.text) for p in read_kept_prompts(tmp_path / "p.parquet")] == [("a", "text")]
