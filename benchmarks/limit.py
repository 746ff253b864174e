"""The least time a job could take: the work counted, over the fastest matrix product measured here.

Work is what any engine must do that computes each distinct prompt token once: weights times tokens
(the LM head, and what follows the last layer's attention, only where a token is chosen) and
attention of each token over its own path. Norms, softmax, sampling, memory traffic and host time
count as nothing, so no engine reaches the limit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.engine import blocked_linear, packed_linear
from pipeline.engine.threads import pooled

_TOKENS = 2048  # rows of the measured product
_TRIES, _TRY_S = 20, 2.0


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @classmethod
    def of(cls, shape: dict[str, Any]) -> Dimensions:
        """From the fields of a Hugging Face config."""
        return cls(
            hidden=shape["hidden_size"],
            intermediate=shape["intermediate_size"],
            layers=shape["num_hidden_layers"],
            heads=shape["num_attention_heads"],
            kv_heads=shape["num_key_value_heads"],
            vocabulary=shape["vocab_size"],
        )

    @property
    def body_weights(self) -> int:
        """Weights that every token meets: q, o, k, v, gate, up, down."""
        kv = self.hidden // self.heads * self.kv_heads
        return self.layers * (self.hidden * self.hidden + 2 * self.hidden * kv + self.tail_weights)

    @property
    def head_weights(self) -> int:
        """Weights that a token meets only where one is chosen."""
        return self.hidden * self.vocabulary

    @property
    def tail_weights(self) -> int:
        """Of a layer, behind its attention: o, gate, up, down. The last one meets chosen tokens."""
        return self.hidden * self.hidden + 3 * self.hidden * self.intermediate

    @property
    def flop_per_pair(self) -> int:
        """FLOP of one query meeting one key and its value, over all layers and heads."""
        return 4 * self.hidden * self.layers


@dataclass(frozen=True)
class Work:
    """Counts of a job. `pairs`: one query token and one key token on its path."""

    prefilled_tokens: int
    decoded_tokens: int
    chosen_tokens: int
    pairs: int

    def flop(self, model: Dimensions) -> int:
        """Floating-point operations, a multiplication and an addition being two."""
        fed = self.prefilled_tokens + self.decoded_tokens
        body = model.body_weights * fed - model.tail_weights * max(0, fed - self.chosen_tokens)
        head = model.head_weights * self.chosen_tokens
        return 2 * (body + head) + model.flop_per_pair * self.pairs


def count_work(prompts: list[list[int]], new_tokens: int, share: bool = True) -> Work:
    """Work of a greedy job. Equal prompts are answered once; `share=False`: nothing is shared."""
    ordered = sorted(set(map(tuple, prompts)) if share else map(tuple, prompts))
    prefilled = pairs = decoded = 0
    for above, prompt in itertools.pairwise([(), *ordered]):
        known, length = _common(above, prompt) if share else 0, len(prompt)
        end = length + new_tokens - 1  # the last token is chosen and never fed
        prefilled += length - known
        decoded += end - length
        pairs += _triangle(end) - _triangle(known)
    return Work(prefilled, decoded, len(ordered) * new_tokens, pairs)


def gemm_rates(model: Dimensions, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of 2048 tokens times the model's own MLP weight: plain, packed by oneDNN, by us."""
    tokens = torch.randn(_TOKENS, model.hidden, dtype=dtype)
    weight = torch.randn(model.intermediate, model.hidden, dtype=dtype)
    flop = 2 * _TOKENS * model.hidden * model.intermediate
    rates = {"matmul": flop / _best_s(lambda: torch.matmul(tokens, weight.T))}
    if packed_linear.is_available(dtype):
        packed = packed_linear.PackedLinear(weight)
        rates["prepacked"] = flop / _best_s(lambda: packed(tokens))
    linear = nn.Linear(model.hidden, model.intermediate, bias=False, dtype=dtype)
    if blocked_linear.suits(linear.requires_grad_(False)):
        blocked = blocked_linear.BlockedLinear(linear)
        with pooled():
            rates["blocked"] = flop / _best_s(lambda: blocked(tokens))
    return rates


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return sum(1 for _ in same)


def _triangle(tokens: int) -> int:
    """Pairs of a sequence whose every token meets itself and all before it."""
    return tokens * (tokens + 1) // 2


def _best_s(product: Callable[[], object]) -> float:
    """The shortest of up to 20 tries, in about two seconds."""
    best, start = float("inf"), time.perf_counter()
    for _ in range(_TRIES):
        begin = time.perf_counter()
        product()
        end = time.perf_counter()
        best = min(best, end - begin)
        if end - start > _TRY_S:
            break
    return best
