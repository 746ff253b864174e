"""The benchmark of schemas counts what it says, on the model of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from benchmarks import structured
from benchmarks.structured_tasks import SCHEMAS, TASKS
from pipeline.engine.load import make_engine
from pipeline.settings import JobSettings

ROOT = Path(__file__).resolve().parents[2]


def test_the_schemas_are_ten_and_are_schemas() -> None:
    assert len(SCHEMAS) == 10
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


def test_every_answer_is_counted_and_forced_tokens_save_steps(monkeypatch: Any) -> None:
    class Small:
        new_tokens, repeats, dtype = 60, 1, "float32"

        def model(self) -> str:
            return str(ROOT / "data" / "demo_model")

    setup: Any = Small()
    engine = make_engine(structured.settings_of(setup, 8, "prefix"))
    assert isinstance(structured.settings_of(setup, 8, "prefix"), JobSettings)
    classification = TASKS[0]
    found = structured.measure(classification, 12, engine, setup, 8)
    assert found["rows"] == found["fit"] + found["cut"] == 12
    assert found["steps_a_row"] < 0.5 * found["tokens_a_row"]
    assert found["fewer_steps"] == pytest.approx(1 - found["steps_a_row"] / found["tokens_a_row"])
    assert classification.name in structured.table({classification.name: found})
