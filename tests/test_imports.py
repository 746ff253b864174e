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
        "prompts", "records", "errors", "forms", "generation", "generation_options", "settings",
        "reuse_settings", "conversation_settings", "scoring_settings", "prompt_settings",
        "sampling_settings", "store_settings", "questions", "time_limit",
        "constraints", "constraint_settings", "narrowed_schemas", "request_rules",
        "template_arguments", "costs", "visible", "private_folder", "confined", "unheard",
        "location", "binomial",
    )
}  # fmt: skip


def _rooms(*names: str) -> set[str]:
    return {f"pipeline.{name}" for name in names}


# room -> what of `pipeline` it may import besides itself, from the ground floor up
ROOMS: dict[str, set[str]] = {
    "pipeline.questions": set(),
    "pipeline.prompts": {"pipeline.questions"},
    "pipeline.records": set(),
    "pipeline.constraints": set(),
    "pipeline.constraint_settings": _FIRST,
    "pipeline.narrowed_schemas": _FIRST,
    "pipeline.visible": set(),
    "pipeline.forms": set(),
    "pipeline.request_rules": set(),
    "pipeline.time_limit": set(),
    "pipeline.template_arguments": set(),
    "pipeline.costs": _rooms("forms"),
    "pipeline.private_folder": set(),
    "pipeline.confined": set(),
    "pipeline.unheard": set(),
    "pipeline.binomial": set(),
    "pipeline.errors": {"pipeline.visible"},
    "pipeline.generation": _FIRST,
    "pipeline.generation_options": _rooms("generation", "request_rules"),
    "pipeline.settings": _FIRST,
    "pipeline.reuse_settings": _FIRST,
    "pipeline.conversation_settings": _FIRST,
    "pipeline.scoring_settings": _FIRST,
    "pipeline.prompt_settings": _rooms("forms", "template_arguments"),
    "pipeline.sampling_settings": _rooms(
        "constraints", "constraint_settings", "forms", "generation_options", "records"
    ),
    "pipeline.store_settings": _rooms("forms"),
    "pipeline.location": _FIRST,
    "pipeline.settings_file": _FIRST,
    "pipeline.plan": _FIRST,
    "pipeline.namespace": set(),
    "pipeline.tokens": _FIRST | {"pipeline.namespace"},
    "pipeline.storage": _FIRST,
    "pipeline.inputs": _FIRST | _rooms("storage", "namespace", "settings_file"),
    "pipeline.kvstore": _FIRST | {"pipeline.storage"},
    "pipeline.model": _FIRST | {"pipeline.storage.durable", "pipeline.plan.documents"},
    "pipeline.report": _FIRST | {"pipeline.storage"},
    "pipeline.engine": _FIRST | _rooms("plan", "model"),
    "pipeline.executor": _FIRST | _rooms("plan", "engine.base", "engine.counters"),
    "pipeline.job": _FIRST
    | _rooms("storage", "inputs", "tokens", "plan", "model", "engine", "kvstore", "segments"),
    "pipeline.audit": _FIRST | _rooms("storage", "plan", "model", "engine", "job"),
    "pipeline.experiment": _FIRST
    | _rooms("storage", "inputs", "tokens", "model", "kvstore", "job", "audit.similarity"),
    "pipeline.segments": _FIRST | _rooms("storage", "plan", "engine"),
    "pipeline.stateful": _FIRST | _rooms("storage", "plan", "engine"),
    "pipeline.segment_training": _FIRST | _rooms("model", "job", "segments", "storage.targets"),
    "pipeline.status": _FIRST | _rooms("storage", "job", "audit"),
    "pipeline.early_checks": _FIRST
    | _rooms("storage", "kvstore", "model", "engine.load", "audit.similarity"),
    "pipeline.engine_loading": _FIRST | _rooms("model", "engine", "executor", "job"),
    "pipeline.plan_files": _FIRST | _rooms("storage", "plan", "job", "report"),
    "pipeline.run": _FIRST
    | _rooms("early_checks", "engine_loading", "storage", "model", "engine", "job", "report"),
    "pipeline.night": _FIRST
    | _rooms("storage", "model.machine", "job", "report", "audit", "run", "settings_file"),
    "pipeline.cli": _FIRST
    | _rooms(
        "inputs",
        "kvstore",
        "job",
        "audit",
        "experiment",
        "plan_files",
        "run",
        "status",
        "night",
        "segments",
        "stateful",
        "segment_training",
        "model.adapter",
        "settings_file",
    ),
    "pipeline.__main__": {"pipeline.cli"},
}
# heavy package -> where it may be imported
HOMES = {
    "prefect": {"flows"},
    "torch": _rooms(
        "model.model",
        "model.device",
        "model.int8",
        "model.quantized",
        "model.machine",
        "engine",
        "audit.replay",
        "kvstore",
        "experiment",
        "segments",
        "stateful",
    ),
    "sentence_transformers": _rooms("audit.similarity", "experiment.retrieval"),
    "faiss": _rooms("audit.sample", "experiment.retrieval"),
    "matplotlib": _rooms("report", "experiment.pages"),
    "ray": _rooms("executor.ray_crew"),
    "jinja2": _rooms("namespace", "inputs", "tokens", "report") | {"kvcoppice.evaluation.model"},
    "llguidance": _rooms("tokens.grammar"),
    "jsonschema": _rooms("tokens.constraint_check", "audit.answer_judge"),
    "prometheus_client": _rooms("job.metrics_export"),
    "pythonjsonlogger": _rooms("cli.logs"),
    "pyarrow": _rooms(
        "storage",
        "inputs",
        "night",
        "plan",
        "job.answer_table",
        "job.answer_columns",
        "job.document_ordering",
    )
    | {"kvcoppice.api", "kvcoppice.frames", "kvcoppice.notebooks"},
    "obstore": _rooms("storage"),
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
        if room is not None and lies_in(name, {"pipeline"}):
            assert lies_in(name, ROOMS[room] | {room}), f"{module} imports {name}"
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
    code = "import sys, pipeline.cli.app; print([m for m in sys.argv[1:] if m in sys.modules])"
    assert run_python(code, *heavy).strip() == "[]"


def test_a_whole_run_never_loads_prefect(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.parquet", ["ab", "abc"])
    code = (
        "import sys\n"
        "from pipeline.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'prefect' not in sys.modules\n"
    )
    run_python(
        code, "run", str(prompts), "-o", str(tmp_path / "out"), "--model", str(model),
        "--engine", "echo", "--progress", "none",
    )  # fmt: skip
    assert (tmp_path / "out" / "_SUCCESS").exists()
