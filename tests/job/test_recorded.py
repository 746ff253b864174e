"""What a run directory says of the job that made it, and what is missing there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunDirectoryError
from pipeline.job.recorded import recall_settings
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.storage.run_directory import SYSTEM_PROMPT_NAME, RunDirectory
from tests.tiny_job import echo_settings, write_prompts

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def said(tokenizer_folder: Path, tmp_path: Path) -> JobSettings:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return echo_settings(
        tokenizer_folder, max_new_tokens=4, system_prompt="be brief", apply_chat_template=True,
        chat_template=tmp_path / "chat.jinja",
    )  # fmt: skip


@pytest.fixture
def run(said: JobSettings, tmp_path: Path) -> RunDirectory:
    run_job(str(write_prompts(tmp_path / "p.parquet", ["hello"])), tmp_path / "out", said)
    return RunDirectory.open(tmp_path / "out")


def change_manifest(run: RunDirectory, **changes: Any) -> None:
    manifest = json.loads((run.root / "run.json").read_text()) | changes
    left = {name: value for name, value in manifest.items() if value is not None}
    (run.root / "run.json").write_text(json.dumps(left))


def test_the_settings_are_those_of_the_job(run: RunDirectory, said: JobSettings) -> None:
    recalled = recall_settings(run)
    assert recalled.tokens.system_prompt == "be brief"
    assert recalled.sampling == said.sampling and recalled.model == said.model


def test_a_run_without_them_is_to_be_made_again(run: RunDirectory) -> None:
    change_manifest(run, settings=None)
    with pytest.raises(RunDirectoryError, match="out does not say how it was made; run the job"):
        recall_settings(run)


def test_a_setting_that_cannot_be_is_named(run: RunDirectory) -> None:
    settings = run.read_manifest()["settings"]
    settings["sampling"]["max_new_tokens"] = -1
    change_manifest(run, settings=settings)
    with pytest.raises(RunDirectoryError, match=r"damaged \(settings.sampling.max_new_tokens: "):
        recall_settings(run)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_system_prompt_that_is_gone_is_asked_for(
    run: RunDirectory, content: bytes | None
) -> None:
    """Else an audit would compare with other prompts."""
    (run.root / SYSTEM_PROMPT_NAME).unlink()
    if content is not None:
        (run.root / SYSTEM_PROMPT_NAME).write_bytes(content)
    with pytest.raises(RunDirectoryError, match="gone or damaged; write the system prompt of the"):
        recall_settings(run)
