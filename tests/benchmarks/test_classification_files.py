"""Classification files: examples that fit the schema, and a guide that all rows begin with."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from jsonschema import Draft202012Validator

from benchmarks.classification_files import FILES, ClassificationFile


@pytest.fixture
def workloads(tmp_path: Path) -> Path:
    prompts = [f"Rules.\n\nQuestion: an example?\nAnswer: 1\n\nQuestion: {n}?\nAnswer:"
               for n in (3, 1, 3, 2)]  # fmt: skip
    for file in FILES:
        pl.DataFrame({"prompt": prompts}).write_parquet(tmp_path / f"{file.source}.parquet")
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_row_is_the_guide_and_a_question_of_its_own(
    file: ClassificationFile, workloads: Path
) -> None:
    frame = file.frame(3, workloads)
    own = [prompt.removeprefix(file.guide) for prompt in frame["prompt"]]
    assert sorted(own) == [f"\n\nQuestion: {n}?\nAnswer:\n" for n in (1, 2, 3)]
    assert [json.loads(form) for form in frame["form"]] == [file.schema] * 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_worked_examples_fit_the_schema(file: ClassificationFile) -> None:
    answers = [line for line in file.guide.splitlines() if line.startswith("{")]
    assert len(answers) == len(file.examples)
    validator = Draft202012Validator(file.schema)
    for answer in answers:
        validator.validate(json.loads(answer))


def test_a_workload_that_is_too_small_is_refused(workloads: Path) -> None:
    with pytest.raises(ValueError, match="has 3 questions, asked for 4"):
        FILES[0].frame(4, workloads)
