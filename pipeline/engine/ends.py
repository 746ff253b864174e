"""When an answer ends by itself: one rule for engines and for the audit. Knows no tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pipeline.engine.base import StopCheck, TokenIds
from pipeline.records import SamplingParams
from pipeline.request_rules import read_asked


def ends_by_token(token_id: int, params: SamplingParams, eos: Collection[int]) -> bool:
    """Whether this token is the last one: the model's end, or one that the row has named."""
    if token_id in eos and not params.ignore_eos:
        return True
    return bool(params.asked) and token_id in read_asked(params.asked).stop_token_ids


def ends_by_text(
    is_stopped: StopCheck, token_ids: Sequence[int], params: SamplingParams, prompt: TokenIds
) -> bool:
    """Whether a stop string ends in the text of these ids; none counts that ends within the first
    `min_tokens` of them."""
    if not params.stop:
        return False
    least = read_asked(params.asked).min_tokens if params.asked else 0
    least = max(0, least - len(params.opening))  # which the prompt holds
    if not least:
        return is_stopped(token_ids, params.stop, prompt)
    if len(token_ids) <= least:
        return False
    before = np.concatenate([np.asarray(prompt), np.asarray(token_ids[:least])]).astype(np.uint32)
    return is_stopped(token_ids[least:], params.stop, before)
