"""Nothing that somebody else wrote acts on a terminal, a log or a page: every command is swept.

The file's name, columns, ids, prompts, tenants, error messages and lock owners all hold sequences
that set a title, clear the screen, reverse the text or break the line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.logs import log_to_stderr
from pipeline.errors import CoppiceError
from pipeline.visible import visible, visible_json
from tests.cli.test_app import Shell
from tests.tiny_job import write_model, write_prompts

EVIL = "x\x1b]0;owned\x07\x1b[2Jy\x9b31mz\u202eabc\u2028\rforged"
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("escapes"))


class SweptShell(Shell):
    """A shell that reads all that a command wrote."""

    def __call__(self, *arguments: str) -> int:
        code = super().__call__(*arguments)
        for name, text in (("stdout", self.out), ("stderr", self.err)):
            assert not ACTING.search(text), f"{arguments[:2]} on {name}: {text!r}"
        return code


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> SweptShell:
    return SweptShell(monkeypatch, capfd)


def write_input(folder: Path) -> Path:
    """Rows whose ids, columns and prompts act on a terminal; some of them cannot run."""
    path = folder / f"in{EVIL.replace('/', '')}.parquet"
    prompts = [f"hello {EVIL} {i % 3}" for i in range(12)] + [None, "h" * 500]
    columns = {"id": [f"{EVIL}{i}" for i in range(14)], "prompt": prompts, EVIL: ["v"] * 14}
    pq.write_table(pa.table(columns), path)
    return path


def test_no_command_lets_a_row_act_on_the_terminal(
    shell: SweptShell, tmp_path: Path, model: Path
) -> None:
    source, out = str(write_input(tmp_path)), str(tmp_path / f"out{EVIL}")
    job = ("--model", str(model), "--device", "cpu")
    assert shell("validate", source, *job) in (0, 3)
    assert "\\x1b" in shell.out, "what acts is shown, and not lost"
    assert shell("validate", source, *job, "--json") in (0, 3)
    assert EVIL in json.loads(shell.out)["examples"][0]["id"]
    assert shell("plan", source, *job, "-o", str(tmp_path / "plan")) == 0
    assert shell("plan", source, *job, "--json") == 0
    assert shell("run", source, "-o", out, *job, "--fail-on-error", "5") == 0
    assert shell("run", source, "-o", out, *job, "--fail-on-error", "1") == 3
    assert shell("run", source, "-o", out, *job, "--log-format", "json") == 3
    for words in (("status",), ("status", "--json"), ("audit",), ("audit", "--json"), ("report",)):
        assert shell(words[0], out, *words[1:]) == 0
    for name in ("report.md", "report.html", "README.md"):
        text = (Path(out) / name).read_text()
        assert not ACTING.search(text), name
    assert shell("convert", out, str(tmp_path / f"{EVIL}.jsonl")) == 0
    assert shell("publish", out, str(tmp_path / f"to{EVIL}"), "--date", EVIL) == 2


@pytest.mark.parametrize(
    "call",
    [
        ("plan", EVIL, "--model", "m"),
        ("plan", f"./{EVIL}.parquet", "--model", EVIL),
        ("run", "x.parquet", "-o", EVIL, "--model", "m", "--engine", EVIL),
        ("run", "x.parquet", "-o", EVIL, f"--{EVIL}"),
        ("status", EVIL),
        ("report", EVIL),
        ("audit", EVIL, "--audit-sample", EVIL),
        ("night", EVIL),
        ("night", "x.yaml", "--date", EVIL),
        ("schedule", "x.yaml", "--cron", EVIL, "--timezone", "UTC"),
        ("convert", EVIL, "x.jsonl"),
        ("recycle", "ls", EVIL),
        ("recycle", "gc", EVIL, "--budget", EVIL),
        ("recycle", "build", EVIL, "--model", "m", "--kv-store", EVIL),
        ("publish", EVIL, EVIL),
        (EVIL,),
        ("validate", "x.parquet", "--config", EVIL),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_wrong_call_acts_on_the_terminal(
    shell: SweptShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[str, ...],
    log_format: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "x.parquet", ["a"])
    (tmp_path / "x.yaml").write_text(json.dumps({EVIL: 1}))
    flags = ("--log-format", "json") if log_format == "json" and call[0] in ("run", "audit") else ()
    assert shell(*call, *flags) == 2
    assert len(shell.err.splitlines()) == 1


def test_an_owner_of_a_lock_cannot_act_on_the_terminal(
    shell: SweptShell, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "p.parquet", ["ab", "ac"])
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setenv("COPPICE_LOCKS", str(locks))
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text(f"process 999999 on {EVIL}\n")
    assert shell("run", str(source), "-o", str(out), "--model", str(model)) == 0


def test_what_a_library_logs_by_itself_acts_on_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: transformers quotes the `model_type` of a config on its own handler."""
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    log_to_stderr()
    other = logging.getLogger("transformers.models")
    monkeypatch.setattr(other, "level", logging.WARNING)  # loading a model makes it quieter
    other.manager._clear_cache()  # type: ignore[attr-defined]
    handler = logging.StreamHandler(sys.stderr)
    other.addHandler(handler)
    other.warning("a model of type %s\nand more", "\x1b[2Jx")
    other.removeHandler(handler)
    assert "a model of type \\x1b[2Jx\nand more" in capsys.readouterr().err


def test_an_error_of_ours_acts_on_nobody_wherever_it_is_shown() -> None:
    assert not ACTING.search(str(CoppiceError(f"the row {EVIL}\nforged"))), "also in Prefect"
    assert "\n" not in str(CoppiceError("a\nb"))


def test_letters_of_all_scripts_stay_as_they_are() -> None:
    text = "Grüße, العربية, हिन्दी \u200d, 👩\u200d👩\u200d👧, می\u200cخواهم, 日本語\u3000, a\u00a0b"
    assert visible(text) == text
    assert visible("a\nb\tc", lines=True) == "a\nb\tc"
    assert visible("a\x1b\n\udcff\x85") == "a\\x1b\\n\\xff\\x85"
    assert json.loads(visible_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL
