"""What a sample says of the share in all that it was drawn from. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Final

CONFIDENCE: Final = 0.95


def clopper_pearson_upper(hits: int, trials: int) -> float:
    """Exact one-sided 95 % upper bound on a share, after `hits` in `trials` that were drawn.

    The share at which so few would be seen in only 5 % of samples: 0 of 59 -> 0.05.
    """
    if hits >= trials:
        return 1.0
    low, high = hits / trials, 1.0
    for _ in range(60):  # halves the bracket each time: exact to the last bit of a double
        middle = (low + high) / 2
        if _binomial_cdf(hits, trials, middle) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def clopper_pearson_lower(hits: int, trials: int) -> float:
    """Exact one-sided 95 % lower bound on a share: 62 of 64 -> 0.90; 0 without a trial."""
    return 1.0 - clopper_pearson_upper(trials - hits, trials)


def _binomial_cdf(most: int, trials: int, share: float) -> float:
    """Probability of at most `most` hits in `trials`, for 0 < share < 1."""
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(share) + (trials - k) * math.log1p(-share)
        for k in range(most + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, logs))
