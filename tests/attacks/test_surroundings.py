"""What surrounds a command: streams that are full or closed, locales, a user without a home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_app import Shell
from tests.tiny_job import PROMPTS, write_prompts, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


class Box:
    """A folder with a model and prompts, and the command in a process of its own there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tokenizer(folder / "model")
        write_prompts(folder / "p.parquet", [*PROMPTS, "ünïcödé 日本 █"])

    def __call__(
        self, *arguments: str | bytes, **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | {
            name: os.environ[name]
            for name in ("PATH", "HOME", "COPPICE_LOCKS")
            if name in os.environ
        }
        environment |= options.pop("env", {})
        code = options.pop("code", None)
        start = ("-m", "pipeline") if code is None else ("-c", str(code))
        for name in [name for name, value in environment.items() if not value]:
            del environment[name]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=self.folder, env=environment, timeout=120, **pipes | options,
        )  # fmt: skip
        return done

    def job(self, command: str, *more: str) -> tuple[str, ...]:
        return (command, "p.parquet", "--model", "model", "--engine", "echo", *more)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return Box(tmp_path_factory.mktemp("box"))


def closing(*streams: int) -> object:
    def close() -> None:
        for number in streams:
            os.close(number)

    return close


def test_a_complete_run_exits_with_0_whatever_became_of_stdout(box: Box) -> None:
    """Seen red: 1, "unexpected OSError", on a full disk, and 120 where stdout was closed."""
    with open("/dev/full", "wb") as full:
        done = box(*box.job("run", "-o", "full"), stdout=full)
    assert done.returncode == 0, done.stderr
    assert b"could not be written to stdout (No space left on device)" in done.stderr
    assert (box.folder / "full" / "_SUCCESS").exists()
    done = box(*box.job("run", "-o", "deaf"), stdout=None, stderr=None, preexec_fn=closing(0, 1, 2))
    assert done.returncode == 0
    assert json.loads((box.folder / "deaf" / "run.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("form", [(), pytest.param(("--json",), marks=pytest.mark.slow)])
def test_a_result_that_is_lost_is_a_failure_that_says_so(box: Box, form: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = box(*box.job("plan", *form), stdout=full)
    assert done.returncode == 1
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("coppice: the result could not be written to stdout (No space left")


def test_a_reader_that_has_gone_is_no_fault_to_report(box: Box) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = box(*box.job("plan", "--json"), stdout=writer)
    os.close(writer)
    assert b"unexpected" not in done.stderr and b"Exception" not in done.stderr
    assert b"coppice:" not in done.stderr


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        pytest.param({"PYTHONIOENCODING": "ascii:strict"}, marks=pytest.mark.slow),
    ],
)
def test_no_locale_stops_a_command(box: Box, locale: dict[str, str]) -> None:
    """Seen red: UnicodeEncodeError at the first bar of a histogram."""
    done = box(*box.job("plan"), env=locale)
    assert done.returncode == 0, done.stderr


NOBODY = """
import pwd, sys
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
from pipeline.cli.app import main
sys.argv[0] = "coppice"
main()
"""


def test_a_user_without_home_and_name_can_work(box: Box) -> None:
    """Seen red: "unexpected RuntimeError", of Path.home()."""
    mine = box.folder / "nobody"
    mine.mkdir()
    done = box(
        *box.job("run", "-o", "homeless"), env={"HOME": "", "TMPDIR": str(mine)}, code=NOBODY
    )
    assert done.returncode == 0, done.stderr
    assert (box.folder / "homeless" / "_SUCCESS").exists()
    (cache,) = [path for path in mine.iterdir() if path.name.startswith("coppice-")]
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    done = box(*box.job("run", "-o", "not"), env={"HOME": "", "TMPDIR": str(mine)}, code=NOBODY)
    assert done.returncode == 2 and b"keep them out); set XDG_CACHE_HOME" in done.stderr


def test_a_name_that_is_not_utf_8_is_refused_in_a_sentence(
    box: Box, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seen red: "unexpected UnicodeEncodeError", after the plan."""
    shell, bad = Shell(monkeypatch, capfd), os.fsdecode(b"\xff")
    for call in (
        ("run", "p.parquet", "-o", bad, "--model", "model", "--engine", "echo"),
        ("plan", bad, "--model", "model", "--engine", "echo"),
        ("status", bad),
        ("convert", "p.parquet", bad),
    ):
        assert shell(*call) == 2
        assert shell.err == "coppice: \\xff is not a name in UTF-8; rename it\n"
    done = box("status", "ü", env={"LC_ALL": "C", "PYTHONUTF8": "0"})  # seen red: "not in UTF-8"
    assert done.returncode == 2 and b"set PYTHONUTF8=1 or a locale like C.UTF-8" in done.stderr
    hidden = os.path.join(os.fsencode(box.folder), b"in\xff")
    os.mkdir(hidden)
    source = str(box.folder / "p.parquet")
    done = box(
        "run", source, "-o", "out", "--model", str(box.model), "--engine", "echo",
        preexec_fn=lambda: os.chdir(hidden),
    )  # fmt: skip
    assert done.returncode == 2 and b"has a name that is not UTF-8" in done.stderr, done.stderr
