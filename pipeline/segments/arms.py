"""The arms of the study: ways to compute rows, each with what it costs.

Names are those of the tables. `below`: documents encoded below the row's own preamble; all others
are encoded alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.plan.documents import Arrangement, Ids, Mode, Reuse, Run, Use, arrange
from pipeline.segments.assembled import Assembler
from pipeline.segments.blend import run_blend
from pipeline.segments.sam_kv import Thinning, run_sam_kv
from pipeline.segments.tasks import FILLERS, START, VOCABULARY

ALL = 10**6  # more tokens than any document has
EPIC_TOKENS = (1, 2, 4, 8)
BLEND_SHARES = (0.05, 0.1, 0.3, 0.5)
Rows = Sequence[list[Ids]]
"""Of each row the ids of its preamble, documents and question."""


class Outcome(NamedTuple):
    """`logits` [B, V] at the questions' last tokens; by row, means over layers: tokens that it
    computed itself, question included, and keys that these looked at; `copies`: whether the row
    needs a copy of its documents that others cannot read."""

    logits: Tensor
    own: Tensor
    seen: Tensor
    copies: bool = False


Arm = Callable[[Assembler, Rows], Outcome]


def full(assembler: Assembler, rows: Rows) -> Outcome:
    """Full attention: everything is computed for each row."""
    nothing = np.zeros(0, np.int64)
    whole = [Arrangement(nothing, [], [Run(0, np.concatenate(row))]) for row in rows]
    return _run(assembler, whole)


def mode(name: Mode, below: bool, turns: bool = True, **options: int) -> Arm:
    """One of the modes that the engine has."""
    reuse = Reuse(name, VOCABULARY, below, **options)

    def arm(assembler: Assembler, rows: Rows) -> Outcome:
        return _run(assembler, [arrange(row, reuse) for row in rows], turns)

    return arm


def behind_a_prefix(assembler: Assembler, rows: Rows) -> Outcome:
    """LegoLink-0: documents are encoded behind some tokens that are thrown away."""
    prefix = np.array([START, *FILLERS[:3]], np.int64)
    laid = []
    for row in rows:
        plain = arrange(row, Reuse("concat", VOCABULARY, False))
        uses = [
            Use(np.concatenate([prefix, use.path]), len(prefix), use.shift - len(prefix))
            for use in plain.uses
        ]
        laid.append(Arrangement(plain.preamble, uses, plain.runs))
    return _run(assembler, laid)


def blend(share: float, seed: int | None = None) -> Arm:
    """CacheBlend below the preamble; with a seed the same number of tokens is drawn."""

    def arm(assembler: Assembler, rows: Rows) -> Outcome:
        copied = [arrange(row, Reuse("concat", VOCABULARY)) for row in rows]
        whole = [arrange(row, Reuse("epic", VOCABULARY, epic_tokens=ALL)) for row in rows]
        draw = None if seed is None else torch.Generator().manual_seed(seed)
        logits, count = run_blend(assembler, assembler.assemble(copied), whole, share, draw)
        layers = len(assembler.model.base_model.layers)
        every, asked = (_cost(x) for x in (whole, copied))
        part = count / (every[0] - asked[0]).clamp(min=1)
        own, seen = (
            (2 * a + (layers - 2) * (b + part * (a - b))) / layers
            for a, b in zip(every, asked, strict=True)
        )
        return Outcome(logits, own, seen, True)

    return arm


def sam_kv(thinning: Thinning) -> Arm:
    """SAM-KV: thinned documents, computed again."""

    def arm(assembler: Assembler, rows: Rows) -> Outcome:
        laid = [arrange(row, Reuse("concat", VOCABULARY, False)) for row in rows]
        logits, count = run_sam_kv(assembler, assembler.assemble(laid), laid, thinning)
        own, seen = _cost(laid)
        return Outcome(logits, own + count, seen * (own + count) / own, True)

    return arm


def untrained_arms(seed: int) -> dict[str, Arm]:
    """All that need no training, by the name of the table."""
    arms: dict[str, Arm] = {
        "full": full,
        "no turn": mode("concat", False, turns=False),
        "concat": mode("concat", False),
        "concat below": mode("concat", True),
        "LegoLink-0": behind_a_prefix,
    }
    arms |= {f"EPIC {k} below": mode("epic", True, epic_tokens=k) for k in EPIC_TOKENS}
    arms |= {f"CacheBlend {share:.0%} below": blend(share) for share in BLEND_SHARES}
    arms["random 30% below"] = blend(0.3, seed)
    arms["SAM-KV"] = sam_kv(Thinning())
    return arms


@dataclass(frozen=True)
class Costs:
    """Of one model, in floating point operations."""

    weights: int
    width: int
    layers: int

    @classmethod
    def of(cls, model: Any) -> Costs:
        layers = model.base_model.layers
        count = sum(p.numel() for p in layers.parameters())
        config = model.config
        heads = config.num_attention_heads * model.base_model.layers[0].self_attn.head_dim
        return cls(count, heads, len(layers))

    def flops(self, own: Tensor, seen: Tensor) -> Tensor:
        """Of so many tokens that look at so many keys, all together."""
        return 2 * self.weights * own + 4 * self.width * self.layers * seen


def encoding_cost(rows: Rows, soft_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """By row (tokens, keys they look at) of encoding its documents alone, once."""
    lengths = [[len(d) + 2 * soft_tokens for d in row[1:-1]] for row in rows]
    tokens = torch.tensor([float(sum(some)) for some in lengths])
    return tokens, torch.tensor([sum(n * (n + 1) / 2 for n in some) for some in lengths])


def _run(assembler: Assembler, rows: Sequence[Arrangement], turns: bool = True) -> Outcome:
    return Outcome(assembler.run(assembler.assemble(rows, turns)), *_cost(rows))


def _cost(rows: Sequence[Arrangement]) -> tuple[Tensor, Tensor]:
    """By row (own tokens, keys they look at): a token at position p sees p + 1."""
    at = [
        np.concatenate([run.position + np.arange(len(run.token_ids)) for run in row.runs])
        for row in rows
    ]
    own = torch.tensor([float(len(x)) for x in at])
    return own, torch.tensor([float((x + 1).sum()) for x in at])
