"""`python -m kvcoppice.flows score`: the flow of a job, with choices found as the command does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows import __main__ as commands


@pytest.mark.parametrize(
    ("written", "asked"),
    [("", {"choices_column": "choices"}), ("choices: [a, b]\n", {"choices": ["a", "b"]})],
)
def test_score_is_the_flow_of_a_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, asked: dict[str, Any]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("flows.generate.generate", lambda *given: seen.extend(given))
    config = tmp_path / "score.yaml"
    config.write_text(f"max-rows: 3\n{written}")
    arguments = ["--input", "in", "--output", "out", "--model", "m", "--config", str(config)]
    done = CliRunner().invoke(commands.app, ["score", *arguments])
    assert done.exit_code == 0, done.output
    flat = seen[2].flat()
    assert {name: flat[name] for name in asked} == asked and flat["model"] == "m"


def test_a_flow_asks_the_questions_of_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("flows.generate.generate", lambda *given: seen.extend(given))
    config = tmp_path / "score.yaml"
    config.write_text("questions: q.yaml\nquestion-order: last\n")
    arguments = ["--input", "in", "--output", "out", "--model", "m", "--config", str(config)]
    done = CliRunner().invoke(commands.app, ["score", *arguments])
    assert done.exit_code == 0, done.output
    flat = seen[2].flat()
    assert flat["questions"] == "q.yaml" and flat["question_order"] == "last"
    assert "choices_column" not in flat or flat["choices_column"] is None
