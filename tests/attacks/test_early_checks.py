"""What is wrong with a job is said before its first row is read, and nothing is left behind."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from pipeline import run as run_module
from pipeline.engine.base import Engine
from pipeline.errors import CoppiceError, EngineError, UsageError
from pipeline.job.observer import Planning, SilentObserver
from pipeline.model import hub
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.job.preparing import watch_prepared
from tests.tiny_job import PROMPTS, echo_settings, write_prompts, write_tokenizer

Spoil = Callable[[Path], dict[str, Any]]


KEPT = ExitStack()


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    KEPT.close()


def full_output(folder: Path) -> dict[str, Any]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    return {}


def file_as_output(folder: Path) -> dict[str, Any]:
    (folder / "out").write_text("mine")
    return {}


def file_above_output(folder: Path) -> dict[str, Any]:
    (folder / "out.d").write_text("mine")
    return {"output": "out.d/deeper/out"}


def wrong_name(folder: Path) -> dict[str, Any]:
    return {"output": os.fsdecode(b"out\xff")}


def taken_port(folder: Path) -> dict[str, Any]:
    taken = KEPT.enter_context(socket.create_server(("127.0.0.1", 0)))
    return {"metrics_port": str(taken.getsockname()[1])}


def file_as_store(folder: Path) -> dict[str, Any]:
    (folder / "kv").write_text("mine")
    return {"kv_store": str(folder / "kv")}


def thesis_in_store(folder: Path) -> dict[str, Any]:
    (folder / "kv").mkdir(mode=0o700)
    (folder / "kv" / "thesis.txt").write_text("mine")
    return {"kv_store": str(folder / "kv")}


def open_store(folder: Path) -> dict[str, Any]:
    (folder / "kv").mkdir()
    (folder / "kv").chmod(0o777)
    return {"kv_store": str(folder / "kv")}


INSTALL = "in a checkout of coppice run: pip install"
FAULTS: list[tuple[Spoil, str]] = [
    (full_output, "is not empty and holds no run of coppice"),
    (file_as_output, "out is a file; choose another one"),
    (file_above_output, "out.d is a file; choose another one"),
    (wrong_name, r"has a name that is not UTF-8"),
    (lambda _: {"executor": "ray"}, rf"--executor ray needs ray; {INSTALL} -e '\.\[ray\]'"),
    (lambda _: {"engine": "vllm"}, rf"--engine vllm needs vllm; {INSTALL} -e '\.\[vllm\]'"),
    (lambda _: {"output": "hf://datasets/a/b"}, "hf:// is not supported; use a folder"),
    (lambda _: {"system_prompt": "be brief"}, "a system prompt needs a chat template"),
    (lambda _: {"apply_chat_template": True}, "has no chat template"),
    (lambda _: {"fidelity": "strict"}, "--fidelity strict is a promise of the prefix engine"),
    (file_as_store, "cannot use --kv-store .*kv: .*kv is a file; name another folder"),
    (thesis_in_store, "kv holds thesis.txt, so it is no KV store"),
    (open_store, "kv is not used, for what others write is no KV of ours"),
    (taken_port, "choose another --metrics-port"),
    (lambda _: {"metrics_file": "nowhere/m.prom"}, "choose another --metrics-file"),
    (lambda _: {"audit_encoder": "./nowhere"}, "the encoder ./nowhere is neither a folder"),
    (lambda f: {"model": f"{f}/modle"}, r"no folder .*/modle \(did you mean .*/model\?\); check"),
]  # fmt: skip


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray and vLLM are not installed."""
    find = util.find_spec

    def lookup(name: str, package: str | None = None) -> Any:
        return None if name in ("ray", "vllm") else find(name, package)

    monkeypatch.setattr("pipeline.early_checks.find_spec", lookup)


@pytest.mark.parametrize(("spoil", "says"), FAULTS, ids=[says[:40] for _, says in FAULTS])
def test_it_is_said_before_a_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil, says: str, no_extras: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_tokenizer(tmp_path / "model")
    write_prompts(tmp_path / "p.parquet", PROMPTS)
    flat = spoil(tmp_path)
    output = flat.pop("output", "out")
    before = sorted(tmp_path.rglob("*"))
    prepared = watch_prepared(monkeypatch)
    settings = echo_settings(Path(flat.pop("model", "model")), **flat)
    with pytest.raises(UsageError, match=says):
        run_job("p.parquet", output, settings)
    assert prepared == [] and sorted(tmp_path.rglob("*")) == before


def test_a_model_that_cannot_be_loaded_ends_the_planning(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: all rows were read first."""
    planned: list[Planning] = []

    class Slow(SilentObserver):
        def show_planning(self, planning: Planning) -> None:
            planned.append(planning)
            time.sleep(0.05)

    def fail(settings: JobSettings) -> Engine:
        raise EngineError("no device")

    monkeypatch.setattr("pipeline.inputs.prompt_source._BATCH_ROWS", 1, raising=False)
    source = write_prompts(tmp_path / "p.parquet", PROMPTS * 2000)
    with pytest.raises(EngineError, match="no device"):
        run_job(str(source), tmp_path / "out", settings, Slow(), fail)
    assert not planned or planned[-1].rows_done < planned[-1].rows_total


def test_a_typo_in_the_model_costs_no_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: transformers asks the hub again and again, for a minute."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_PATIENCE_S", 1.0)
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "demo-model")
    source = write_prompts(tmp_path / "p.parquet", PROMPTS)
    started = time.monotonic()
    for name, says in (
        ("demo-modle", r"there is no folder demo-modle \(did you mean demo-model\?\), and the"),
        ("org/nothing", "there is no folder org/nothing, and the cache has no such model"),
        ("a/b/c", "there is no folder a/b/c; check --model"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all; check --model"),
        ("p.parquet", "p.parquet is a file"),
    ):
        with pytest.raises(CoppiceError, match=says):
            run_module.plan_job(str(source), echo_settings(Path(name)))
    assert time.monotonic() - started < 10
