"""Log-probabilities of chosen tokens and of the likeliest ones: of the logits as the model gives
them, before penalties, masks and temperature, as OpenAI and vLLM have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.records import TokenLogprobs


def read_logprobs(
    logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Of each row its chosen token's, and those of its `counts` likeliest. logits [rows, V]."""
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, chosen).squeeze(1).tolist()
    best, ids = (found.tolist() for found in logprobs.topk(min(max(counts), logits.shape[1])))
    return [
        TokenLogprobs(logprob, tuple(ids[row][:count]), tuple(best[row][:count]))
        for row, (logprob, count) in enumerate(zip(own, counts, strict=True))
    ]
