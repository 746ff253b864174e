"""What the baseline's logits say of given tokens: how likely each is, and how far from chosen.

Logits are [n, V] in float64, rows those that choose each of `output`; `predicted`: [n], the tokens
that the baseline chooses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.base import Replay
from pipeline.engine.sampling import truncated_cdf, uniform_noise
from pipeline.records import SamplingParams


def greedy_replay(logits: Tensor, output: Sequence[int], predicted: NDArray[np.int64]) -> Replay:
    """Margins and deficits in nats."""
    logprobs = torch.log_softmax(logits, -1)
    top = logprobs.topk(2).values
    given = torch.tensor(output, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, given).squeeze(1)
    return Replay(
        predicted,
        chosen.cpu().numpy(),
        (top[:, 0] - top[:, 1]).cpu().numpy(),
        (top[:, 0] - chosen).cpu().numpy(),
    )


def sampled_replay(
    logits: Tensor,
    output: Sequence[int],
    params: SamplingParams,
    keys: NDArray[np.uint64],
    predicted: NDArray[np.int64],
) -> Replay:
    """For sampled rows the distance is one of probability mass, not of nats: how far the noise lies
    from the interval of the run's token (deficit), and from leaving its own (margin)."""
    order, cumulative = truncated_cdf(logits, [params] * len(output))
    noise = torch.from_numpy(uniform_noise(keys, np.arange(len(output)))).to(logits.device)
    upper, lower = _intervals(order, cumulative, torch.tensor(output, device=logits.device))
    deficit = torch.clamp(torch.maximum(lower - noise, noise - upper), min=0.0)
    own_upper, own_lower = _intervals(
        order, cumulative, torch.from_numpy(predicted).to(logits.device)
    )
    margin = torch.minimum(noise - own_lower, own_upper - noise)
    logprob = torch.log((upper - lower).clamp_min(1e-300))
    return Replay(predicted, logprob.cpu().numpy(), margin.cpu().numpy(), deficit.cpu().numpy())


def _intervals(order: Tensor, cumulative: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Where on the cumulative distribution each row's token lies: (upper, lower), in [0, 1]."""
    rank = (order == tokens.unsqueeze(1)).int().argmax(-1, keepdim=True)
    total = cumulative[:, -1]
    upper = cumulative.gather(1, rank).squeeze(1) / total
    below = cumulative.gather(1, (rank - 1).clamp_min(0)).squeeze(1) / total
    return upper, torch.where(rank.squeeze(1) > 0, below, torch.zeros_like(below))
