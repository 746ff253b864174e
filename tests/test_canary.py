"""Text of the input and of the answers is in the output's Parquet files and nowhere else.

Every text of a job holds a word that is nowhere else on this machine. Then all that the commands
left or said is searched for these words: logs at the finest level, both streams, the run directory,
the user's cache, temporary files, removed ones that are still open included.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.inputs import parquet_input
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.run import run_job
from pipeline.storage.run_directory import SYSTEM_PROMPT_NAME
from tests.cli.test_app import Shell
from tests.tiny_job import FailingEngine, on, write_model, write_prompts

PROMPT, SYSTEM, VALUE, COLUMN, TENANT, STOP = (
    f"canary{word}sings" for word in ("prompt", "system", "value", "column", "tenant", "stop")
)
TEXTS = (PROMPT, SYSTEM, VALUE, COLUMN, TENANT)
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
# Where text may be, relative to the run directory; README.md says so.
MAY_HOLD_TEXT = ("data/", "failed.parquet", SYSTEM_PROMPT_NAME)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache, a folder of temporary files and a log of everything, all below tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    log = logging.FileHandler(tmp_path / "log.txt")
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.DEBUG)
    loggers = [root, logging.getLogger("coppice")]
    for logger in loggers:
        logger.addHandler(log)
    yield tmp_path
    for logger in loggers:
        logger.removeHandler(log)
    log.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Good rows of every kind and bad ones, each with its words."""
    prompts = [f"{PROMPT} {i % 3}" for i in range(8)] + [None, "x" * 500 + PROMPT]
    return write_prompts(
        tmp_path / "p.parquet",
        prompts,
        topic=[f"{VALUE} {i}" for i in range(10)],
        note=[f"{COLUMN} {i}" for i in range(10)],
        tenant=[f"{TENANT} {i % 2}" for i in range(10)],
        sampling_params=[{"stop": [STOP]}] * 10,
    )


def leaks(paths: Iterable[Path], words: Iterable[str]) -> list[tuple[str, str]]:
    """(file, word) for every word in a file or in a value of a Parquet file."""
    found = []
    for path in paths:
        content = read(path)
        found += [(str(path), word) for word in words if word in content]
    return found


def read(path: Path) -> str:
    content = path.read_bytes().decode(errors="replace")
    if content.startswith("PAR1"):
        table = pq.read_table(path)
        content += repr(table.schema) + repr(table.to_pydict())
    return content


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def check_silence(places: Path, shell: Shell, words: Iterable[str]) -> None:
    """Nothing in what was said, logged, cached or left among the temporary files."""
    said = shell.out + shell.err + (places / "log.txt").read_text()
    assert [word for word in words if word in said] == []
    kept = files_below(places / "temp") + files_below(places / "cache")
    assert leaks(kept, words) == []


def check_directory(out: Path, words: Iterable[str]) -> None:
    may_not = [p for p in files_below(out) if not in_a_place_for_text(str(p.relative_to(out)))]
    assert len(may_not) > 3 and leaks(may_not, words) == []


def in_a_place_for_text(name: str) -> bool:
    return name.startswith(MAY_HOLD_TEXT)


def echoed(words: Iterable[str]) -> list[str]:
    """With what the echo engine answers: the words, reversed."""
    return [*words, *(word[::-1] for word in words)]


@pytest.mark.fault(
    "canary strings",
    injected="plan, run, report, status, convert: a unique word in prompts, answers, system "
    "prompt, columns, tenants",
    outcome="only in data/, failed.parquet, system_prompt.txt (0600)",
)
def test_a_job_tells_its_text_to_its_output_alone(
    places: Path, shell: Shell, model: Path, source: Path
) -> None:
    """Seen red: the system prompt in run.json and report.html."""
    out = places / "out"
    said = ("--model", str(model), "--engine", "echo", "--apply-chat-template", "--system-prompt")
    job = (*said, SYSTEM, "--max-new-tokens", "60", "--config", str(places / "job.yaml"))
    (places / "job.yaml").write_text("fail-on-error: 9\n")
    words = echoed(TEXTS)
    for command in (
        ("plan", str(source), *job, "-o", str(places / "plan"), "--html", str(places / "p.html")),
        ("plan", str(source), *job, "--json"),
        ("run", str(source), "-o", str(out), *job, "--progress", "plain"),
        ("run", str(source), "-o", str(out), *job, "--progress", "plain"),
        ("status", str(out)),
        ("status", str(out), "--json"),
        ("report", str(out)),
        ("convert", str(out), str(places / "answers.jsonl")),
    ):
        assert shell(*command) == 0, shell.err
        check_silence(places, shell, words)
    assert leaks([*files_below(places / "plan"), places / "p.html"], words) == []
    check_directory(out, words)
    answers = pl.read_parquet(out / "data" / "*.parquet")["generated_text"].drop_nulls()
    assert any(PROMPT[::-1] in text for text in answers)  # the words were where they could leak
    kept = out / SYSTEM_PROMPT_NAME
    assert kept.read_text() == SYSTEM and stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.fault(
    "canary strings",
    injected="audit: a unique word in prompts and the system prompt; the answers of a model",
    outcome="nothing in audit/, run.json, report, metrics, logs",
)
def test_an_audit_tells_no_text(places: Path, shell: Shell, model: Path, source: Path) -> None:
    out = places / "out"
    said = ("--model", str(model), "--apply-chat-template", "--system-prompt", SYSTEM)
    job = (*said, "--max-new-tokens", "12", "--ignore-eos", "--fail-on-error", "9")
    watched = ("--log-format", "json", "--metrics-file", str(places / "job.prom"))
    assert shell("run", str(source), "-o", str(out), *job, *watched) == 0
    answers = pl.read_parquet(out / "data" / "*.parquet")["generated_text"].drop_nulls()
    words = [*TEXTS, *(text for text in answers if len(text) >= 8)]
    assert len(words) > len(TEXTS)
    check_silence(places, shell, words)
    for command in (("audit", str(out)), ("audit", str(out), "--json"), ("report", str(out))):
        assert shell(*command) == 0, shell.err
        check_silence(places, shell, words)
    check_directory(out, words)


@pytest.mark.fault(
    "canary strings",
    injected="template over columns: unique words in what it prints, and where it fails",
    outcome="only in the output's Parquet files",
)
def test_a_template_tells_no_value(places: Path, shell: Shell, model: Path, source: Path) -> None:
    (places / "t.j2").write_text("{{ topic }}{{ tenant + 1 }}")
    job = ("--model", str(model), "--engine", "echo", "--template", str(places / "t.j2"))
    assert shell("run", str(source), "-o", str(places / "bad"), *job) == 3
    check_silence(places, shell, echoed(TEXTS))
    failed = pl.read_parquet(places / "bad" / "failed.parquet")
    assert failed.height == 10 and not any(VALUE in text for text in failed["error_message"])
    (places / "t.j2").write_text("{{ topic }} {{ note }}")
    assert shell("run", str(source), "-o", str(places / "good"), *job) == 0
    check_silence(places, shell, echoed(TEXTS))
    check_directory(places / "good", echoed(TEXTS))


@pytest.mark.fault(
    "canary strings",
    injected="a crash inside: an unexpected error whose message quotes a prompt, --debug off",
    outcome="its type and place, not its message",
)
def test_a_crash_inside_tells_no_text(
    places: Path, shell: Shell, model: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: with the message printed. What is open at the moment of the crash is read as well,
    the temporary file of token ids that has no name any more included."""
    open_files: list[str] = []

    def crash() -> None:
        for number in os.listdir("/proc/self/fd"):
            path = Path("/proc/self/fd") / number
            if path.exists() and str(places / "temp") in os.readlink(path):
                open_files.append(read(path))
        raise RuntimeError(f"the prompt was {PROMPT}")

    crashing = partial(run_job, make_engine=on(FailingEngine(1, crash)))
    monkeypatch.setattr("pipeline.run.run_job", crashing)  # what the command looks up
    job = ("--model", str(model), "--engine", "echo", "-o", str(places / "out"))
    assert shell("run", str(source), *job, "--progress", "plain") == 1
    assert "unexpected RuntimeError in test_canary.py" in shell.err
    check_silence(places, shell, echoed(TEXTS))
    check_directory(places / "out", echoed(TEXTS))
    assert open_files and not any(word in text for text in open_files for word in echoed(TEXTS))


@pytest.mark.fault(
    "canary strings",
    injected="a plan that is killed: an interruption with a checkpoint in the user's cache",
    outcome="token ids and ids of rows there, no text; folder 0700, files 0600",
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_checkpoint_holds_no_text(
    places: Path,
    shell: Shell,
    model: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    """Seen red: names of tenants in the cache, files there that others could read."""
    monkeypatch.setattr(parquet_input, "BATCH_ROWS", 2)
    monkeypatch.setattr(Checkpoint, "every_rows", 2)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.job.conversations.build_plan", interrupt)
    job = ("--model", str(model), "--engine", "echo", "-o", str(places / "out"))
    assert shell(command, str(source), *job) == 130
    kept = files_below(places / "cache")
    assert {"tokens.bin", "rows-00000.parquet", "state.json"} <= {path.name for path in kept}
    check_silence(places, shell, TEXTS)
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in kept} == {0o700}
    state = json.loads(next(path for path in kept if path.name == "state.json").read_text())
    assert state["params"][0]["stop"] == [STOP]  # a sampling field, and documented as kept


def test_validation_shows_the_first_prompt_and_no_other(
    places: Path, shell: Shell, model: Path, source: Path
) -> None:
    job = ("--model", str(model), "--engine", "echo")
    assert shell("validate", str(source), *job) == 3  # some of its rows cannot run
    assert PROMPT in shell.out and COLUMN not in shell.out
    shell.out = ""
    check_silence(places, shell, TEXTS)


@pytest.mark.parametrize("damage", ["ids", "page"])
def test_a_refused_input_is_not_quoted(
    places: Path, shell: Shell, model: Path, source: Path, damage: str
) -> None:
    if damage == "ids":
        write_prompts(source, [PROMPT, PROMPT], id=["same", "same"], note=[COLUMN] * 2)
    else:
        write_prompts(source, [PROMPT] * 50, note=[COLUMN] * 50)
        content = bytearray(source.read_bytes())
        content[60:90] = bytes(30)
        source.write_bytes(content)
    job = ("--model", str(model), "--engine", "echo", "-o", str(places / "out"))
    assert shell("run", str(source), *job) == 2
    check_silence(places, shell, TEXTS)


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """In plain files, in compressed Parquet, in a schema."""
    pl.DataFrame({COLUMN: [PROMPT] * 9}).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text(SYSTEM)
    found = leaks(files_below(tmp_path), TEXTS)
    assert {word for _, word in found} == {COLUMN, PROMPT, SYSTEM}
