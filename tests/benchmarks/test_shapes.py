"""Models of the benchmarks: what is saved as int8 is what the product would make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import scratch, shapes
from pipeline.model.int8 import hold_in_int8, holds_int8
from pipeline.model.model import load_model
from pipeline.settings import ModelSettings


def test_a_saved_model_in_int8_is_the_one_that_is_rounded_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path))
    rounded = shapes.load_random("tiny", "bfloat16").model
    hold_in_int8(rounded)
    folder = shapes.int8_folder("tiny")
    saved = load_model(
        ModelSettings(model=str(folder), dtype="bfloat16", device="cpu", weights="int8")
    ).model
    assert holds_int8(saved)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(saved(ids).logits, rounded(ids).logits)
