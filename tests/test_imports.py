"""Who may import whom (ARCHITECTURE.md), read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_job import write_prompts, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for room in ("pipeline", "flows", "kvcoppice") for path in (ROOT / room).rglob("*.py")
)

_FIRST = {
    f"pipeline.{name}"
    for name in (
        "records",
        "errors",
        "forms",
        "settings",
        "time_limit",
        "visible",
        "private_folder",
        "confined",
        "generation",
        "unheard",
    )  # fmt: skip
}
# room -> what of `pipeline` it may import besides itself; None: everything
ROOMS: dict[str, set[str] | None] = {
    "pipeline.records": set(),
    "pipeline.errors": {"pipeline.visible"},
    "pipeline.forms": set(),
    "pipeline.visible": set(),
    "pipeline.time_limit": set(),
    "pipeline.private_folder": set(),
    "pipeline.confined": set(),
    "pipeline.unheard": set(),
    "pipeline.generation": _FIRST,
    "pipeline.settings": _FIRST,
    "pipeline.plan": _FIRST,
    "pipeline.tokens": _FIRST,
    "pipeline.storage": _FIRST,
    "pipeline.engine": _FIRST | {"pipeline.plan"},
    "pipeline.executor": _FIRST | {"pipeline.plan", "pipeline.engine.base"},
    "pipeline.audit": _FIRST | {"pipeline.storage", "pipeline.engine.base"},
    "pipeline.report": _FIRST | {"pipeline.storage", "pipeline.engine.base"},
    "pipeline.recycle": _FIRST | {"pipeline.storage", "pipeline.engine.base"},
    "pipeline.job": _FIRST
    | {
        f"pipeline.{room}"
        for room in ("storage", "tokens", "plan", "engine", "audit", "report", "recycle")
    },
    "pipeline.terminal": _FIRST | {"pipeline.job", "pipeline.run", "pipeline.recycle"},
    "pipeline.night": _FIRST
    | {f"pipeline.{room}" for room in ("run", "job", "storage", "report", "terminal.options")}
    | {"pipeline.engine.machine"},
}
# heavy package -> where it may be imported
HOMES = {
    "prefect": {"flows"},
    "torch": {"pipeline.engine", "pipeline.audit.replay", "pipeline.recycle"},
    "sentence_transformers": {"pipeline.audit.similarity", "pipeline.recycle.retrieval"},
    "faiss": {"pipeline.audit.sample", "pipeline.recycle.retrieval"},
    "matplotlib": {"pipeline.report"},
    "ray": {"pipeline.executor.ray_crew"},
    "prometheus_client": {"pipeline.job.metrics_export"},
    "pythonjsonlogger": {"pipeline.terminal.logs"},
    "pyarrow": {
        "pipeline.storage",
        "pipeline.plan",
        "pipeline.job.answers",
        "kvcoppice.api",
        "kvcoppice.frames",
    },
}
STANDARD_ONLY = _FIRST


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it; those for type checking alone as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lies_in(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    module = module_name(path)
    room = next((name for name in ROOMS if lies_in(module, {name})), None)
    for name in imported(path):
        assert not lies_in(name, {"flows"}) or lies_in(module, {"flows", "kvcoppice.flows"}), name
        if not lies_in(module, {"kvcoppice"}) and lies_in(name, {"kvcoppice"}):
            assert (module, name) == ("flows", "kvcoppice.own_modules.load")
        allowed = None if room is None else ROOMS[room]
        if room is not None and allowed is not None and lies_in(name, {"pipeline"}):
            assert lies_in(name, allowed | {room}), f"{module} imports {name}"
        package = name.split(".")[0]
        assert package not in HOMES or lies_in(module, HOMES[package]), f"{module} imports {name}"
        if module in STANDARD_ONLY:
            assert package in sys.stdlib_module_names | {"pipeline", "pydantic"}, name


def test_the_rules_cover_every_room() -> None:
    folders = {f"pipeline.{p.parent.name}" for p in (ROOT / "pipeline").glob("*/__init__.py")}
    assert folders <= set(ROOMS)


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_starts_without_anything_heavy() -> None:
    heavy = ("torch", "transformers", "sentence_transformers", "faiss", "matplotlib", "pyarrow")
    code = "import sys, pipeline.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    assert run_python(code, *heavy).strip() == "[]"


def test_a_whole_run_never_loads_prefect(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.parquet", ["ab", "abc"])
    code = (
        "import sys\n"
        "from pipeline.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'prefect' not in sys.modules\n"
    )
    run_python(
        code, "run", str(prompts), "-o", str(tmp_path / "out"), "--model", str(model),
        "--engine", "echo", "--progress", "none",
    )  # fmt: skip
    assert (tmp_path / "out" / "_SUCCESS").exists()
