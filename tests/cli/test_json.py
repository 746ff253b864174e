"""`--json`: one document on stdout and everything else on stderr; `--version`; completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cli.test_app import Shell, model, prompts, shell
from tests.tiny_job import write_prompts

__all__ = ["model", "prompts", "shell"]


def test_run_says_what_became_of_it_as_one_json_document(
    shell: Shell, prompts: str, model: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    job = ("run", prompts, "-o", out, "--model", model, "--engine", "echo", "--json")
    assert shell(*job, "--fail-on-error", "1") == 0
    told = json.loads(shell.out)
    assert (told["directory"], told["was_complete"]) == (out, False)
    assert (told["rows"], told["rows_ok"], told["rows_failed"]) == (3, 2, 1)
    assert told["reasons"] == {"NullPrompt": 1}
    assert told["counters"]["prompt_tokens"] == 20
    assert "3 rows, 20 prompt tokens" in shell.err
    assert shell(*job, "--fail-on-error", "1") == 0
    assert json.loads(shell.out)["was_complete"] is True


def test_a_run_with_too_many_failed_rows_is_told_as_json_too(
    shell: Shell, prompts: str, model: str, tmp_path: Path
) -> None:
    job = ("run", prompts, "-o", str(tmp_path / "out"), "--model", model, "--engine", "echo")
    assert shell(*job, "--json") == 3
    assert json.loads(shell.out)["reasons"] == {"NullPrompt": 1}
    assert "--fail-on-error 1% allows 0" in shell.err


def test_an_error_is_told_on_stderr_alone(shell: Shell, model: str, tmp_path: Path) -> None:
    job = ("run", "nowhere", "-o", str(tmp_path / "out"), "--model", model, "--json")
    assert shell(*job) == 2
    assert shell.out == "" and "nowhere" in shell.err


def test_a_dry_run_and_the_settings_are_json_where_it_is_asked_for(
    shell: Shell, prompts: str, model: str, tmp_path: Path
) -> None:
    job = ("run", prompts, "-o", str(tmp_path / "out"), "--model", model, "--engine", "echo")
    assert shell(*job, "--dry-run", "--json") == 0
    assert json.loads(shell.out)["prompt_tokens"] == 20
    assert shell(*job, "--print-config", "--json") == 0
    assert json.loads(shell.out)["engine"] == "echo"


def test_a_report_says_as_json_where_it_is(
    shell: Shell, prompts: str, model: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    shell(
        "run", prompts, "-o", out, "--model", model, "--engine", "echo", "--fail-on-error", "1"
    )  # fmt: skip
    assert shell("report", out, "--json") == 0
    told = json.loads(shell.out)
    assert told["page"] == f"{out}/report.html" and "2" in told["summary"]


def test_retry_says_what_became_of_it_as_json(shell: Shell, model: str, tmp_path: Path) -> None:
    source = str(write_prompts(tmp_path / "p.parquet", ["a", "b"]))
    out = str(tmp_path / "out")
    shell("run", source, "-o", out, "--model", model, "--engine", "echo")
    assert shell("retry", out, "--json") == 0
    told = json.loads(shell.out)
    assert (told["was_complete"], told["rows_failed"]) == (True, 0)
    assert "nothing to do" in shell.err


def test_convert_says_as_json_how_many_rows_there_are(shell: Shell, tmp_path: Path) -> None:
    source = str(write_prompts(tmp_path / "q.parquet", ["a", "b"]))
    target = str(tmp_path / "requests.jsonl")
    assert shell("convert", source, target, "--json") == 0
    assert json.loads(shell.out) == {"target": target, "rows": 2}


def test_version_names_the_installed_one(shell: Shell) -> None:
    assert shell("--version") == 0
    assert shell.out == f"coppice {version('kvcoppice')}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("coppice re", ["recycle", "report", "retry"]),
        ("coppice run --kern", ["--kernels"]),
        ("coppice run --kernels ", ["auto", "torch"]),
        ("coppice run --kernels t", ["torch"]),
    ],
)
def test_a_shell_completes_commands_flags_and_choices(typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    asked = {
        "_COPPICE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "kvcoppice"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert sorted(done.stdout.split()) == offered
