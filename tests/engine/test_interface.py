"""An engine is asked, not prodded: hooks go into a call, capabilities are declared."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.base import Engine, EngineCapabilities, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.engine.kv_connector import KVFormat
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.test_kv_connector import TokenStore

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline"
HOOKS = {
    "on_logits": EngineHooks(on_logits=lambda rows, at, logits: None),
    "force_tokens": EngineHooks(force_tokens=lambda rows, at: rows),
    "kv_connector": EngineHooks(kv_connector=TokenStore()),
}


def engines() -> list[Engine]:
    loaded = tiny.load_tiny()
    return [EchoEngine(), NaiveEngine(loaded), PrefixEngine(loaded, EngineSettings())]


def prodded(tree: ast.AST) -> list[str]:
    """Assignments to a field of something that is called an engine, but for `self.engine = ...`."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else targets
        for target in targets:
            if isinstance(target, ast.Attribute) and "engine" in ast.unparse(target.value).lower():
                found.append(ast.unparse(target))
    return found


def test_nothing_is_assigned_to_an_engine_from_outside() -> None:
    assert prodded(ast.parse("self._engine.counters = 1")) == ["self._engine.counters"]
    assert prodded(ast.parse("engine.teacher = None")) == ["engine.teacher"]
    for path in PIPELINE.rglob("*.py"):
        assert prodded(ast.parse(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_used_or_refused_and_never_left_out(name: str) -> None:
    plan = tiny.plan_of([[5, 6, 7], [5, 6, 8]])
    for engine in engines():
        knows = (
            engine.capabilities.kv if name == "kv_connector" else engine.capabilities.shows_logits
        )
        assert bool(knows) == (engine.name == "prefix")
        if not knows:
            with pytest.raises(EngineError, match=f"does not know the hook {name}"):
                engine.generate(plan, np.arange(2), RunControl(), HOOKS[name])


def test_counts_are_new_from_the_call_on_and_closing_twice_is_once() -> None:
    """Not from the first answer on: who reads them meanwhile would count the last call again."""
    plan = tiny.plan_of([[5, 6, 7], [5, 6, 8]])
    for engine in engines():
        list(engine.generate(plan, np.arange(2), RunControl()))
        assert engine.counters.generated_tokens
        engine.generate(plan, np.arange(2), RunControl())
        assert not engine.counters.generated_tokens, engine.name
        engine.close()
        engine.close()


def test_kv_is_exchanged_in_the_form_of_the_loaded_weights() -> None:
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    assert engine.capabilities.kv == KVFormat("float32", 2 * 2 * 2 * 16 * 4)


def test_a_run_tells_an_audit_what_its_engine_could_do() -> None:
    of = EngineCapabilities.recorded
    assert of({"name": "x", "capabilities": {"computes_once": True, "replays_noise": False}}) == (
        EngineCapabilities(computes_once=True, replays_noise=False)
    )
    assert of({"name": "prefix", "notes": []}) == EngineCapabilities(computes_once=True)
    assert of({"name": "vllm"}) == EngineCapabilities(replays_noise=False)
    assert of({}) == EngineCapabilities()
