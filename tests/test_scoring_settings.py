"""What people say about scores: defaults, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.layers import merge, merge_scores, to_flat
from pipeline.errors import UsageError
from pipeline.model.identity import fingerprint_fields
from pipeline.settings import JobSettings

CHOICES = {"choices": "yes,no"}


def read(**flat: Any) -> JobSettings:
    return JobSettings.from_flat({"model": "m"} | flat)


def fingerprint(**flat: Any) -> dict[str, Any]:
    return fingerprint_fields(read(**flat), {"model": "m"}, {"input": "i", "tokenizer": "t"})


def test_nothing_is_scored_unless_somebody_asks() -> None:
    assert not read().scoring.scores
    assert fingerprint() == {k: v for k, v in fingerprint(**CHOICES).items() if k in fingerprint()}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("yes,no", ("yes", "no")),
        ("yes, no", ("yes", " no")),
        (["yes, no"], ("yes, no",)),
        ([" a, b", "c"], (" a, b", "c")),
        (("one",), ("one",)),
    ],
)
def test_choices_are_taken_as_they_are_written(said: Any, meant: tuple[str, ...]) -> None:
    asked = read(choices=said)
    assert asked.scoring.choices == meant
    again = to_flat(asked)["choices"]
    assert tuple(again) == meant


def test_what_is_scored_is_part_of_the_fingerprint() -> None:
    others = [
        fingerprint(),
        fingerprint(choices="yes,no"),
        fingerprint(choices="no,yes"),
        fingerprint(choices_column="choices"),
        fingerprint(choices_column="labels"),
        fingerprint(choices_column="labels", normalize="bytes"),
        fingerprint(continuation_column="labels"),
        fingerprint(prompt_logprobs=True),
    ]
    assert len({repr(sorted(f.items(), key=str)) for f in others}) == len(others)


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"choices": "yes,"}, "choices: a choice is empty"),
        ({"choices": ["a", "b", "a"]}, "the choice 'a' is there twice"),
        ({"choices": 3}, "write it as yes,no"),
        ({"choices": "a,b", "choices_column": "c"}, "--choices-column and --choices exclude"),
        ({"choices": "a,b", "continuation_column": "c"}, "--choices and --continuation-column"),
        ({"continuation_column": "c", "prompt_logprobs": True}, "exclude each other"),
        ({"normalize": "bytes"}, "normalize bytes compares choices"),
        ({"continuation_column": "c", "normalize": "tokens"}, "normalize tokens compares choices"),
        ({"normalize": "words", **CHOICES}, "normalize"),
        ({"temperature": 0.5, **CHOICES}, "--choices does not work with --temperature"),
        ({"max_new_tokens": 5, **CHOICES}, "does not work with --max-new-tokens"),
        ({"stop": "x", **CHOICES}, "does not work with --stop"),
        ({"generation_options": "min_p=0.1", **CHOICES}, "--generation-options"),
        ({"conversation_column": "c", **CHOICES}, "does not work with --conversation-column"),
        ({"documents_column": "c", **CHOICES}, "does not work with --documents-column"),
        ({"reuse": "epic", **CHOICES}, "does not work with --reuse epic"),
        ({"document_order": "best", **CHOICES}, "does not work with --document-order best"),
        ({"engine": "vllm", **CHOICES}, "does not work with --engine vllm"),
        ({"engine": "echo", "prompt_logprobs": True}, "--prompt-logprobs does not work with"),
    ],
)
def test_contradictions_are_named(flat: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(**flat)


def test_the_command_finds_the_column_of_choices_unless_told(tmp_path: Path) -> None:
    config = tmp_path / "score.yaml"
    config.write_text("model: m\nchoices: [a, b]\n")
    assert merge_scores({"model": "m"}, None).scoring.choices_column == "choices"
    assert merge_scores({"model": "m", "normalize": "bytes"}, None).scoring.normalize == "bytes"
    assert merge_scores({}, config).scoring.choices == ("a", "b")
    assert merge_scores({"prompt_logprobs": True, "model": "m"}, None).scoring.prompt_logprobs
    assert not merge({"model": "m"}, None).scoring.scores


def test_score_has_no_flag_that_means_nothing() -> None:
    shown = CliRunner().invoke(app, ["score", "--help"], env={"COLUMNS": "200"}).output
    assert "--choices-column" in shown and "--normalize" in shown and "--fidelity" in shown
    for flag in ("--temperature", "--max-new-tokens", "--reuse", "--evict"):
        assert flag not in shown
