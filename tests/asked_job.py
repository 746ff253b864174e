"""What tests of questions run on: a file of three kinds, rows, and what a full forward says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.inputs.questions_file import read_questions
from pipeline.questions import Order, Questionnaire
from tests.test_scores import expected, settings_of
from tests.tiny_job import write_prompts

TEXTS: list[str | None] = ["a plum is a fruit", "stones are soft", "a plum is a fruit", "well, no"]
ANSWER = "answer:"
"""The cue of these files: no blank behind it, so that labels of a letter are one token."""
QUESTIONS: list[dict[str, Any]] = [
    {"name": "kind", "text": "which of them?", "kind": "choice", "labels": ["bad", "best", "no"]},
    {"name": "sure", "text": "how sure, {{ who }}?", "kind": "scale", "labels": ["1", "2", "5"]},
    {"name": "fine", "text": "is it?", "kind": "boolean", "labels": ["y", "n"]},
]


def write_questions(path: Path, questions: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
    """A file of QUESTIONS unless others are given."""
    content = {"questions": QUESTIONS if questions is None else questions, "answer": ANSWER} | keys
    said = {key: value for key, value in content.items() if value is not None}
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def write_rows(path: Path, texts: list[str | None] = TEXTS, **columns: list[Any]) -> Path:
    """Each with a column `who`."""
    who = ["me" if row % 2 else "you" for row in range(len(texts))]
    return write_prompts(path, texts, **({"who": who} | columns))


def asked_settings(model: Path, folder: Path, **flat: Any) -> Any:
    """Of a job with the questions in `folder`."""
    return settings_of(model, **({"questions": folder / "q.yaml"} | flat))


def check_row(
    model: Path, row: dict[str, Any], sheet: Questionnaire, order: Order = "last"
) -> None:
    """That all columns of a row are what a full forward of each label gives."""
    place = 0
    for question in sheet.ordered(order).questions:
        text = question.text.replace("{{ who }}", row["who"])
        context = sheet.ordered(order).compose(row["prompt"], text)
        assert isinstance(context, str)
        found = [expected(model, context, label) for label in question.labels]
        values, some = [value for value, *_ in found], slice(place, place + len(found))
        place += len(found)
        assert row["loglikelihoods"][some] == pytest.approx(values, abs=1e-4)
        assert row["token_counts"][some] == [tokens for _, tokens, _ in found]
        assert row["greedy"][some] == [greedy for *_, greedy in found]
        weights = [math.exp(value - max(values)) for value in values]
        shares = [weight / sum(weights) for weight in weights]
        assert row["probabilities"][some] == pytest.approx(shares, abs=1e-4)
        best = max(range(len(shares)), key=lambda i: (round(shares[i], 4), -i))
        is_one = {tokens for _, tokens, _ in found} == {1}
        mass = pytest.approx(sum(map(math.exp, values)), abs=1e-4) if is_one else None
        assert row[f"{question.name}_label_mass"] == mass
        name = question.name
        if question.kind == "choice":
            assert row[name] == question.labels[best]
            assert row[f"{name}_probability"] == pytest.approx(shares[best], abs=1e-4)
        elif question.kind == "boolean":
            assert row[name] is (best == 0)
            assert row[f"{name}_probability"] == pytest.approx(shares[0], abs=1e-4)
        else:
            mean = sum(float(n) * p for n, p in zip(question.labels, shares, strict=True))
            assert row[name] == pytest.approx(mean, abs=1e-3)
            assert row[f"{name}_likeliest"] == float(question.labels[best])
            assert row[f"{name}_probability"] == pytest.approx(shares[best], abs=1e-4)
    assert place == len(row["loglikelihoods"])
    assert row["choice"] is row["choice_index"] is row["label_mass"] is row["perplexity"] is None


def sheet_of(path: Path) -> Questionnaire:
    """As the job reads it."""
    return read_questions(path)
