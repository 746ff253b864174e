"""Does tree attention compute what this very model computes alone? Asked once, at load.

A handful of random prompts that share, extend and repeat each other go through the engine; every
logit that chose a token is compared with the model's own eager attention, teacher-forced.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.base import RunControl
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError, UsageError
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit, as a share of the largest logit."""


def self_test(engine: PrefixEngine) -> float:
    """Worst difference, as a share of the largest logit. Raises EngineError above the tolerance,
    UsageError where the KV budget has no room for the test."""
    model = engine.loaded.model
    plan = _small_plan(engine.loaded.shape.vocabulary_size)
    seen: dict[tuple[int, int], Tensor] = {}

    def record(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        seen.update(zip(zip(sequences, positions, strict=True), logits.clone(), strict=True))

    engine.logits_probe = record
    try:
        done = list(engine.generate(plan, np.arange(len(plan.sequences)), RunControl()))
    finally:
        engine.logits_probe = None
    if any(completion.finish_reason == "error" for completion in done):
        raise UsageError(
            f"the KV budget of {engine.settings.kv_budget} bytes cannot hold even a prompt of "
            "40 tokens; raise --kv-budget"
        )
    worst = 0.0
    model.set_attn_implementation("eager")
    for completion in done:
        prompt = plan.prompt_token_ids(completion.sequence).astype(np.int64).tolist()
        ids = torch.tensor([[*prompt, *completion.token_ids[:-1]]], device=engine.loaded.device)
        with torch.inference_mode():
            expected = model(ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        got = torch.stack([seen[completion.sequence, i] for i in range(len(completion.token_ids))])
        difference = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        worst = max(worst, float(difference))
    limit = _TOLERANCE[model.dtype]
    if not worst <= limit:
        raise EngineError(
            f"self-test: tree attention differs from the model's own by {worst:.1e} of the largest "
            f"logit (limit {limit:.0e}); reuse would be unsound for this model"
        )
    return worst


def _small_plan(vocabulary_size: int) -> Plan:
    draw = np.random.default_rng(0)
    shared, short, own = (draw.integers(0, vocabulary_size, n) for n in (24, 3, 9))
    rows = [
        [*shared, *own],
        [*shared, *own, *short],
        [*shared, *short, *own],
        [*shared, *short],
        [*own],
    ]
    params = (SamplingParams(max_new_tokens=3, ignore_eos=True),)
    ids = [str(i) for i in range(len(rows))]
    table = TokenTable.from_lists(rows, vocabulary_size)
    return build_plan(table, ids, params, np.zeros(len(rows), np.int64))
