"""Settings of a wrong kind, from YAML and from Python: one sentence, before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import kvcoppice
from pipeline.cli.layers import merge
from pipeline.errors import UsageError
from pipeline.settings import SECTIONS, JobSettings
from tests.tiny_job import write_prompts


def _numbers() -> list[str]:
    """Settings that are numbers, and none of them a switch."""
    found = []
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            kinds = {field.annotation, *get_args(field.annotation)}
            if kinds & {int, float} and bool not in kinds:
                found.append(name)
    assert len(found) > 30
    return found


@pytest.mark.parametrize("name", _numbers())
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(name: str, value: bool, tmp_path: Path) -> None:
    """`logprobs: true` was taken for 1: an answer that nobody had asked for."""
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        JobSettings.from_flat({"model": "m", name: value})
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"model": "m", name: value}))
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        merge({}, config)


@pytest.mark.parametrize(
    "said",
    [
        {"system_prompt": "a\ud800"},
        {"stop": "\udfff"},
        {"stop": ["a", "\ud800b"]},
        {"choices": ["a", "\ud800"]},
        {"regex": "\ud800"},
        {"prompt_column": "\ud800"},
        {"generation_options": {"bad_words": ["\ud800"]}},
        {"chat_template_kwargs": {"x": "\ud800"}},
        {"reasoning_tags": "<a\ud800>,</a>"},
    ],
    ids=lambda said: next(iter(said)),
)
def test_half_a_surrogate_pair_is_one_sentence(
    said: dict[str, Any], tmp_path: Path, tokenizer_folder: Path
) -> None:
    """YAML and Python can spell what no tokenizer and no file takes."""
    source = write_prompts(tmp_path / "p.parquet", ["a"])
    with pytest.raises(UsageError) as error:
        kvcoppice.run(source, tmp_path / "out", model=tokenizer_folder, **said)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**400])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    """A row's is, so that both say the same."""
    with pytest.raises(UsageError, match="setting seed: "):
        JobSettings.from_flat({"model": "m", "seed": seed})


def test_a_list_of_one_choice_is_that_choice() -> None:
    """From Python a list says where a choice ends; its commas are its own."""
    chosen = JobSettings.from_flat({"model": "m", "choices": ["yes, of course"]})
    assert chosen.scoring.choices == ("yes, of course",)
    assert JobSettings.model_validate(chosen.model_dump(mode="json")) == chosen
    split = JobSettings.from_flat({"model": "m", "choices": " yes, no"})
    assert split.scoring.choices == (" yes", " no")
