"""What a wheel and an sdist carry: they differ from a checkout, and all must run the demo."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_DEMO = (
    "demo_model/model.safetensors", "demo_model/tokenizer.json", "prompts.parquet",
    "segment_model/model.safetensors", "segment_model/tokenizer.json", "segment_prompts.parquet",
    "stateful_model/model.safetensors", "stateful_model/tokenizer.json",
    "conversation_prompts.parquet",
    "cache_prompts.csv", "test_prompts.csv",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"]
    done = subprocess.run([*command, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_carries_model_prompts_templates_and_all_packages(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {f"pipeline/demo/{name}" for name in _DEMO} <= names
    assert {"pipeline/report/page.html.j2", "pipeline/cli/app.py", "flows/generate.py"} <= names
    assert {"flows/automations.yaml", "flows/prefect.yaml"} <= names
    assert {"kvcoppice/__init__.py", "kvcoppice/flows.py", "kvcoppice/py.typed"} <= names
    assert {"kvcoppice/lm_eval.py", "kvcoppice/evaluation/model.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "data/"))]


def test_the_sdist_carries_what_make_needs(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"data/{name}" for name in _DEMO} <= names
    assert {
        "Makefile",
        "kvcoppice/py.typed",
        "prefect.yaml",
        "constraints.txt",
        "LICENSE",
        "data/train_model.py",
    } <= names
