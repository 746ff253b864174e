"""Adapters: what is saved is loaded, and what is wrong is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.errors import ModelError
from pipeline.model.adapter import Card, load_adapter, reuse_of, save_adapter
from pipeline.reuse_settings import ReuseSettings

MODEL = {"model": "abc", "revision": None}
CARD = Card(
    model=MODEL, mode="packet", soft_tokens=2, data_sha256="ff", agreement=0.9, kl=0.01,
    kl_untrained=0.5, document_tokens=[300, 400, 500], most_documents=4, seed=1, training={},
)  # fmt: skip
ROWS = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", CARD, ROWS)
    return tmp_path / "adapter"


def load(folder: Path, **changes: Any) -> Any:
    return load_adapter(folder, MODEL | changes.pop("model", {}), changes.pop("hidden_size", 8))


def test_what_is_saved_is_loaded(folder: Path) -> None:
    adapter = load(folder)
    assert adapter.card == CARD and np.array_equal(adapter.rows, ROWS)
    reuse = reuse_of(ReuseSettings(reuse="packet", adapter=folder), 97, adapter)
    assert reuse is not None and not reuse.is_below_preamble
    assert (reuse.mode, reuse.soft_tokens, reuse.soft_rows) == ("packet", 2, 4)


def test_the_same_training_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "again", CARD, ROWS)
    assert load(folder).digest == load(tmp_path / "again").digest
    save_adapter(tmp_path / "again", CARD, ROWS + 1)
    assert load(folder).digest != load(tmp_path / "again").digest


def test_weights_held_otherwise_are_the_same_model(folder: Path) -> None:
    assert load(folder, model={"weights": "int8"}).card == CARD


def damage(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def with_rows(rows: Any, key: str = "rows") -> bytes:
    return save({key: rows})


def changed(fields: dict[str, Any]) -> bytes:
    return json.dumps(CARD.model_dump() | fields).encode()


DAMAGES: list[tuple[str, bytes | None, str]] = [
    ("card.json", None, "no card.json in"),
    ("rows.safetensors", None, "no rows.safetensors in"),
    ("card.json", b"{", "card.json is damaged"),
    ("card.json", b"[" * 100_000, "card.json is damaged"),
    ("card.json", b"\xff", "card.json is damaged"),
    ("card.json", changed({"mode": "concat"}), "card.json is damaged"),
    ("card.json", changed({"soft_tokens": 0}), "card.json is damaged"),
    ("card.json", changed({"document_tokens": []}), "card.json is damaged"),
    ("rows.safetensors", b"", "rows.safetensors is damaged"),
    ("rows.safetensors", with_rows(ROWS)[:-3], "rows.safetensors is damaged"),
    ("rows.safetensors", with_rows(ROWS, "lines"), "rows.safetensors is damaged"),
    ("rows.safetensors", with_rows(ROWS.astype(np.float16)), "holds no float32 rows"),
    ("rows.safetensors", with_rows(ROWS[0]), "holds no float32 rows"),
    ("rows.safetensors", with_rows(ROWS[:3]), r"shape \[3, 8\], but .* ask for \[4, 8\]"),
    ("rows.safetensors", with_rows(ROWS * np.float32("nan")), "not finite"),
    ("rows.safetensors", with_rows(ROWS * np.float32("inf")), "not finite"),
]


@pytest.mark.fault(
    "adapter damaged or of another model",
    injected="card or rows missing, cut, not JSON, not finite, of a wrong shape or type",
    outcome="a sentence that names the file, before the model is loaded",
)
@pytest.mark.parametrize(("name", "content", "says"), DAMAGES, ids=lambda x: str(x)[:30])
def test_a_damaged_adapter_is_refused(
    folder: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        damage(folder, name, content)
    with pytest.raises(ModelError, match=says):
        load(folder)


@pytest.mark.fault(
    "adapter damaged or of another model",
    injected="an adapter whose card names another model or another width",
    outcome="a sentence that says so, before the model is loaded",
)
def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    for other in ({"model": "def"}, {"revision": "1"}):
        with pytest.raises(ModelError, match="trained for another model"):
            load(folder, model=other)
    with pytest.raises(ModelError, match=r"ask for \[4, 16\]"):
        load(folder, hidden_size=16)
    with pytest.raises(ModelError, match="so it is no adapter"):
        load(folder / "nowhere")


def test_short_documents_and_others_than_the_card_s_are_said(folder: Path) -> None:
    adapter = load(folder)
    assert adapter.warnings(np.array([310, 400, 5000])) == []
    assert "below 256" in adapter.warnings(np.array([100]))[0]
    assert "documents of 300 to 500" in adapter.warnings(np.array([900]))[0]
    assert adapter.warnings(np.array([], np.int64)) == []
