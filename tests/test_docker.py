"""The image's recipe: linted, made of what is there, and its commands are ours.

Built and run by hand (see CHANGELOG.md); CI has no container engine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value


def test_the_recipe_has_no_lint() -> None:
    """Seen red: `apt-get install` without --no-install-recommends."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(FOLDER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_is_copied_is_there_and_let_through() -> None:
    recipe = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in recipe.splitlines() if line.startswith("COPY ")]
    sources = {source for line in copied for source in line}
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert sources and all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} == {x for x in ignored if x.startswith("!")}


def test_torch_is_the_one_of_the_constraints() -> None:
    recipe = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    match = re.search(r"ARG TORCH=(torch==\S+)", recipe)
    assert match is not None
    assert match[1] in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_the_server_is_for_this_machine_alone(compose: dict[str, Any]) -> None:
    """It asks nobody for a password. Seen red: with `4200:4200`."""
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:4200:4200"]


@pytest.mark.parametrize("service", ["nights", "nights-gpu"])
def test_the_night_of_the_compose_file_is_a_command_of_ours(
    compose: dict[str, Any], service: str
) -> None:
    command = compose["services"][service]["command"]
    told = CliRunner().invoke(app, [command[0], "--help"], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    flags = [word for word in command if word.startswith("--")]
    assert flags and all(flag in told.output for flag in flags)
