"""What the engine asks of kernels on fixed plans: which token, where, in which slot, seeing what.

These numbers decide every bit of a logit and hold on every machine. Written down before spans and
positions were parted; a change that means to move KV must say why it writes others.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny


class Recorder(TorchKernel):
    """Keeps what each forward asks, and computes nothing."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.digest = hashlib.sha256()

    def prepare(
        self, spans: np.ndarray, positions: np.ndarray, owner: np.ndarray | None = None
    ) -> Any:
        assert owner is None
        self.digest.update(np.concatenate([spans.ravel(), positions]).astype(np.int64).tobytes())
        return None

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        for part in (batch.input_ids, batch.slots, batch.copy_from, batch.copy_to, keep):
            if part is not None:
                self.digest.update(part.numpy().tobytes())
        return torch.zeros(len(keep), tiny.VOCABULARY)


@pytest.mark.parametrize(
    ("seed", "min_prefix_tokens", "tokens", "limits", "expected"),
    [
        (1, 4, None, {}, "d91076800d3fc6c9"),
        (2, 1, None, {"max_rows": 5, "max_batch_tokens": 32}, "058f303e492a34a4"),
        (3, 16, 240, {}, "0fbca8768af9d9fe"),
        (4, 1000, 300, {"max_rows": 9, "max_batch_tokens": 16}, "8c9fbb6005767375"),
    ],
)
def test_prefixes_are_laid_out_as_ever(
    seed: int, min_prefix_tokens: int, tokens: int | None, limits: dict[str, Any], expected: str
) -> None:
    draw = random.Random(seed)
    prompts = tiny.random_prompts(draw, 40)
    params = (tiny.LONGER, SamplingParams(max_new_tokens=70, ignore_eos=True))
    chosen = [draw.choice([0, 0, 1]) for _ in prompts]
    plan = tiny.plan_of(prompts, params, chosen, min_prefix_tokens)
    loaded, recorder = tiny.load_tiny(), Recorder()
    budget = tokens and tokens * loaded.shape.kv_bytes_per_token()
    settings = EngineSettings(kv_budget=budget, kernels="torch", **limits)
    plain = PrefixEngine(loaded, settings)
    engine = PrefixEngine(
        loaded, settings, replace(plain.backend, forward=recorder, kernel=recorder)
    )

    def given(sequences: list[int], positions: list[int]) -> list[int]:
        return [
            (7 * s + 3 * p) % tiny.VOCABULARY for s, p in zip(sequences, positions, strict=True)
        ]

    every, hooks = np.arange(len(plan.sequences)), EngineHooks(force_tokens=given)
    assert len(list(engine.generate(plan, every, RunControl(), hooks))) == len(every)
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens
    assert bool(engine.counters.recomputed_tokens) == (tokens is not None)
    assert recorder.digest.hexdigest()[:16] == expected
