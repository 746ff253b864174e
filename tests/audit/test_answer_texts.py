"""The texts that an audit compares are shown as the rows want them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.audit.auditing import audit_run
from pipeline.audit.similarity import Encoder
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, JobSettings
from tests.tiny_job import write_model, write_prompts


class Comparing:
    """An encoder to which texts are alike where they are the same."""

    name = "equality"

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        return np.ones((len(texts), 1), np.float32)

    def cosine(self, ours: list[str], theirs: list[str]) -> NDArray[np.float64]:
        self.pairs = [*zip(ours, theirs, strict=True)]
        return np.array([float(one == other) for one, other in self.pairs])


def test_an_audit_compares_texts_as_their_rows_want_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: tuple[dict[str, Any], ...] = (
        {"allowed_token_ids": [1], "skip_special_tokens": False},
        {"allowed_token_ids": [7], "stop": "f", "include_stop_str_in_output": True},
        {"allowed_token_ids": [7], "stop": "f", "min_tokens": 2},
        {},
    )
    cells = [json.dumps(cell) for cell in asked]
    source = write_prompts(tmp_path / "p.parquet", ["hello world"] * 4, sampling_params=cells)
    settings = JobSettings.from_flat({
        "model": str(write_model(tmp_path / "model", sharpness=3.0)), "max_new_tokens": 8,
        "dtype": "float32", "ignore_eos": True,
    })  # fmt: skip
    run_job(str(source), tmp_path / "out", settings)
    encoder = Comparing()
    monkeypatch.setattr(Encoder, "load", classmethod(lambda cls, name=None: encoder))
    whole = AuditSettings(audit_sample="100%", audit_arms=0, audit_free_running=4)
    assert audit_run(Location(str(tmp_path / "out")), whole).passed
    assert [ours for ours, _ in encoder.pairs][:3] == ["<eos>" * 8, "f", "ff"]
    assert all(ours == theirs for ours, theirs in encoder.pairs), encoder.pairs
