"""What a wheel and an sdist carry: they differ from a checkout, and all must run the demo."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]
_DEMO = (
    "demo_model/model.safetensors", "demo_model/tokenizer.json", "prompts.parquet",
    "segment_model/model.safetensors", "segment_model/tokenizer.json", "segment_prompts.parquet",
    "stateful_model/model.safetensors", "stateful_model/tokenizer.json",
    "conversation_prompts.parquet",
    "cache_prompts.csv", "test_prompts.csv",
)  # fmt: skip


def listed(builder: SdistBuilder | WheelBuilder) -> set[str]:
    """What an archive would carry; to press the models into one takes most of a build."""
    builder.metadata.validate_fields()
    return {file.distribution_path for file in builder.recurse_included_files()}


def check_wheel(names: set[str]) -> None:
    assert {f"pipeline/demo/{name}" for name in _DEMO} <= names
    assert {"pipeline/report/page.html.j2", "pipeline/cli/app.py", "flows/generate.py"} <= names
    assert {"flows/automations.yaml", "flows/prefect.yaml"} <= names
    assert {"kvcoppice/__init__.py", "kvcoppice/flows.py", "kvcoppice/py.typed"} <= names
    assert {"kvcoppice/lm_eval.py", "kvcoppice/evaluation/model.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "data/"))]


def check_sdist(names: set[str]) -> None:
    assert {f"data/{name}" for name in _DEMO} <= names
    assert {
        "Makefile",
        "kvcoppice/py.typed",
        "prefect.yaml",
        "constraints.txt",
        "LICENSE",
        "data/train_model.py",
    } <= names


def test_the_wheel_carries_model_prompts_templates_and_all_packages() -> None:
    check_wheel(listed(WheelBuilder(str(ROOT))))


def test_the_sdist_carries_what_make_needs() -> None:
    check_sdist(listed(SdistBuilder(str(ROOT))))


@pytest.mark.slow
def test_archives_that_are_built_carry_it_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"]
    done = subprocess.run([*command, "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_wheel(set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        check_sdist({name.split("/", 1)[1] for name in archive.getnames() if "/" in name})
