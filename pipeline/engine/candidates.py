"""The token that a row's noise chooses, looked for among its likeliest tokens alone.

To sort a whole vocabulary in float64 for one token touches some thirty times the memory that its
logits take. The few hundred likeliest tokens nearly always hold the one that is drawn, and what is
drawn is what the sort of all would give (`sampling.truncated_cdf`). A row is left open, to be drawn
from more tokens, wherever that is not certain:

- what is kept, or what the noise asks for, reaches beyond the candidates;
- the token is as likely as the last candidate: others may be as likely, and come before it;
- rounding decides: the noise or top-p lies within `_DOUBT` of a border between two tokens, or two
  unequal logits have probabilities that are hardly apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.records import SamplingParams

_DOUBT = 1e-9  # of a row's mass; sums of a million numbers in float64 err by less
_APART = 1e-12  # of a probability
_NEVER_DRAWN = 1e-20  # of the likeliest token's probability: lost in any sum with it
_FEWEST, _GROWTH = 256, 16  # candidates
_SORTED_SHARE = 0.25  # of the vocabulary: from there on all of it is sorted
_CACHED = 1 << 18  # numbers in float64 that stay in a core's cache
_CACHED_ON_CARD = 1 << 22


@dataclass(frozen=True, slots=True)
class Law:
    """What rows keep of their distributions: [rows] each, `top_k` the vocabulary where all is kept.

    float64, int64, on the logits' device.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> Law:
        return cls(
            torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=device),
        )

    def __getitem__(self, rows: Tensor) -> Law:
        return Law(self.temperature[rows], self.top_p[rows], self.top_k[rows])


class Drawn(NamedTuple):
    """`token_ids` [rows] int64, and `is_settled` [rows] bool: False where the token means nothing
    and more candidates must be looked at. Logits that hold a NaN or no number settle nothing."""

    token_ids: Tensor
    is_settled: Tensor


def widths(vocabulary: int) -> list[int]:
    """How many candidates to look at, one try after another; none where a sort is as cheap."""
    powers = (_FEWEST * _GROWTH**power for power in range(8))
    return [width for width in powers if width <= vocabulary * _SORTED_SHARE]


def total_weights(logits: Tensor, law: Law) -> Tensor:
    """[rows] float64: the sum of a row's weights, its likeliest token weighing 1."""
    rows, vocabulary = logits.shape
    temperature = law.temperature.unsqueeze(1)
    best = logits.amax(-1, keepdim=True) / temperature
    total = torch.empty(rows, dtype=torch.float64, device=logits.device)
    cached = _CACHED if logits.device.type == "cpu" else _CACHED_ON_CARD
    step = max(1, cached // vocabulary)
    for low in range(0, rows, step):
        few = slice(low, low + step)
        weights = (logits[few] / temperature[few]).sub_(best[few]).exp_()
        torch.sum(weights, -1, out=total[few])
    return total


def draw(logits: Tensor, law: Law, total: Tensor, noise: Tensor, width: int) -> Drawn:
    """Look at the `width` likeliest tokens. logits [rows, V]; noise [rows] float64; `total` of
    `total_weights`, read where the law keeps all tokens of a row."""
    vocabulary = logits.shape[1]
    logits, ids = _likeliest(logits, width)
    scores = logits / law.temperature.unsqueeze(1)
    weights = (scores - scores[:, :1]).exp_()
    top_p, is_cut = law.top_p.unsqueeze(1), law.top_k <= width
    mass = weights.masked_fill(_rank(weights) >= law.top_k.unsqueeze(1), 0.0)
    mass = mass / torch.where(is_cut, mass.sum(-1), total).unsqueeze(1)
    before = mass.cumsum(-1) - mass
    mass = mass.masked_fill(before >= top_p, 0.0)
    cumulative = mass.cumsum(-1)
    goes_on = ~is_cut & (before[:, -1] < law.top_p)
    is_known = (is_cut | (law.top_k == vocabulary)) & (~goes_on | (law.top_p == 1.0))
    threshold = noise * torch.where(goes_on, 1.0, cumulative[:, -1])
    place = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True)
    place = place.clamp_(max=width - 1)
    chosen, high, own = (x.gather(1, place).squeeze(1) for x in (logits, cumulative, mass))
    is_clear = (high - threshold > _DOUBT) & (
        (place.squeeze(1) == 0) | (threshold - (high - own) > _DOUBT)
    )
    is_clear &= (law.top_p == 1.0) | ((before - top_p).abs() > _DOUBT).all(-1)
    is_clear &= ~_is_close(logits, weights).any(-1)
    is_settled = is_known & is_clear & (chosen > logits[:, -1])
    return Drawn(ids.gather(1, place).squeeze(1), is_settled)


def _likeliest(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Logits and ids [rows, width] of so many tokens, by falling logit, equal ones by id."""
    logits, ids = logits.topk(width, sorted=False)
    ids, order = ids.sort(-1)
    logits, order = logits.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return logits, ids.gather(1, order)


def _is_close(logits: Tensor, weights: Tensor) -> Tensor:
    """[rows, width - 1]: unequal neighbours whose probabilities rounding may make equal."""
    high, low = weights[:, :-1], weights[:, 1:]
    differs = logits[:, :-1] != logits[:, 1:]
    return differs & (low >= high * (1.0 - _APART)) & (low > _NEVER_DRAWN)


def _rank(weights: Tensor) -> Tensor:
    return torch.arange(weights.shape[1], device=weights.device)
