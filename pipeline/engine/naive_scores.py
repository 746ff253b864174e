"""Log-probabilities of continuations by full forwards, one for each sequence, nothing shared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from pipeline.engine.base import Likelihood
from pipeline.plan.plan import Plan
from pipeline.records import Scored

ForcedLogits = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Of a prompt and an output: the logits that choose each token of the output, [n, V]."""


def read_scores(logits: Tensor, ids: Sequence[int]) -> Scored:
    """Of logits [n, V] that choose each of `ids`; NaN where they are no numbers."""
    rows = logits.float()
    given = torch.tensor(ids, device=rows.device).unsqueeze(1)
    logprobs = torch.log_softmax(rows, -1).gather(1, given).squeeze(1)
    return Scored(tuple(logprobs.tolist()), rows.argmax(-1).tolist() == list(ids))


def score_sequence(
    forced_logits: ForcedLogits, plan: Plan, sequence: int, prompt: Sequence[int]
) -> tuple[Scored, ...]:
    """Of each request of a sequence of a plan with scores; they end at one position."""
    scores = plan.scores
    assert scores is not None
    requests = [
        scores.target_id[
            scores.target_of_token[slice(*scores.token_bounds[place : place + 2])]
        ].tolist()
        for place in range(*scores.bounds[sequence : sequence + 2].tolist())
    ]
    longest = max(requests, key=len)
    logits = forced_logits(prompt[: len(prompt) - len(longest) + 1], longest)
    return tuple(read_scores(logits[len(longest) - len(ids) :], ids) for ids in requests)


Request = tuple[Sequence[int], Sequence[int]]
"""A context and a continuation."""


def likelihoods(forced_logits: ForcedLogits, requests: Sequence[Request]) -> Iterator[Likelihood]:
    """Of each request. Neighbours that differ in nothing but their last tokens have one forward."""
    for fed, some in groupby(requests, key=lambda request: [*request[0], *request[1][:-1]]):
        continuations = [ids for _, ids in some]
        longest = max(continuations, key=len)
        logits = forced_logits(fed[: len(fed) - len(longest) + 1], longest)
        for ids in continuations:
            yield _likelihood(logits[len(longest) - len(ids) :], ids)


def _likelihood(logits: Tensor, ids: Sequence[int]) -> Likelihood:
    logprobs = torch.log_softmax(logits.float(), -1)
    top = logprobs.topk(2).values
    given = logprobs.gather(1, torch.tensor(ids, device=logprobs.device).unsqueeze(1)).squeeze(1)
    return Likelihood(
        math.fsum(given.tolist()),
        len(ids),
        float((top[:, 0] - given).max()),
        float((top[:, 0] - top[:, 1]).min()),
    )
