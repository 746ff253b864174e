"""A person's own pipeline.py, and their folder flows/, beside a job: nothing of ours breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.night.units import make_schedule, serve
from tests.night.test_settings import write
from tests.sweeps import sweep

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a job and with modules of a person's, which must not be run."""
    (tmp_path / "pipeline.py").write_text("raise SystemExit('this is their pipeline')\n")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise SystemExit('these are their flows')\n")
    write(tmp_path, engine="echo", model=str(tmp_path))
    return tmp_path


def python(folder: Path, *words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Python in the folder, which comes first on its path, as with many a PYTHONPATH."""
    found = os.pathsep.join([str(folder), str(ROOT)]) if path is None else path
    own = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True,
        env=own | {"PYTHONPATH": found, "PREFECT_HOME": str(folder / "prefect")},
    )  # fmt: skip


def test_the_command_runs(theirs: Path) -> None:
    """As the script of the wheel does it, and by name. Seen red: "No module named pipeline.cli"."""
    script = ("-c", "import sys; from kvcoppice.__main__ import main; main()", "night", "--help")
    for words in (script, ("-m", "kvcoppice", "night", "--help")):
        done = python(theirs, *words)
        assert done.returncode == 0 and "unfinished nights" in done.stdout, done.stderr


def test_a_night_of_cron_or_systemd_runs(theirs: Path) -> None:
    """Seen red: with the folder in PYTHONPATH, theirs."""
    planned = make_schedule(theirs / "nightly.yaml", "0 2 * * *", "UTC")
    done = python(theirs, *planned.command()[1:])
    assert done.returncode == 2 and "Failed" in done.stdout, done.stderr
    assert "is its disk mounted?" in done.stderr


def test_the_schedule_is_served(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the server, which is not there. Seen red: their flows ran in the place of ours."""
    commands: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, words: commands.append(words))
    serve(make_schedule(theirs / "nightly.yaml", "0 2 * * *", "UTC"), "nightly")
    for path in (None, str(ROOT)):
        done = python(theirs, *commands[0][1:], path=path)
        assert done.returncode == 2 and "no Prefect server is named" in done.stderr, done.stderr


@pytest.mark.parametrize("flow", sweep(("generate", "audit", "nightly"), ("nightly",)))
def test_prefect_finds_the_flow_of_a_deployment(theirs: Path, flow: str) -> None:
    """As `prefect deploy` and a worker load it. Seen red: "these are their flows"."""
    code = (
        "from prefect.flows import load_flow_from_entrypoint as load\n"
        f"print(load('kvcoppice.flows.{flow}').name)"
    )
    done = python(theirs, "-c", code)
    assert done.returncode == 0 and done.stdout.strip() == f"coppice-{flow}", done.stderr


def test_their_script_is_told_in_a_sentence_which_file_hides_ours(theirs: Path) -> None:
    (theirs / "job.py").write_text("import kvcoppice\nkvcoppice.plan\n")
    done = python(theirs, "job.py")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert said.startswith(f"ImportError: {theirs / 'pipeline.py'} hides the package pipeline of")
    # Theirs was found, and not run.
    assert "this is their pipeline" not in done.stderr


def test_their_module_that_was_imported_before_is_named(theirs: Path) -> None:
    (theirs / "pipeline.py").write_text("HERS = 1\n")
    done = python(theirs, "-c", "import pipeline; from kvcoppice.__main__ import main; main()")
    assert f"{theirs / 'pipeline.py'} hides the package pipeline" in done.stderr.splitlines()[-1]


def test_without_theirs_it_is_ours() -> None:
    done = python(ROOT, "-c", "import kvcoppice; print(kvcoppice.run.__module__)")
    assert done.stdout.strip() == "kvcoppice.api", done.stderr
