"""Which tokens may follow, a bit each, and what that does to logits. Knows no grammars.

```
 mask      0110 0000 0000 1000 ...      few bits: their logits alone are looked at
           1111 1101 1111 1111 ...      many: all others are ruled out in a copy of the row
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.sampling import Sampled

Mask = NDArray[np.int32]
"""[words] a bit for each token id, the first id lowest."""
BITS: Final = 32
_FEW: Final = 2048
"""Tokens that are sooner gathered than all others ruled out."""


def set_bit(mask: Mask, token_id: int, is_allowed: bool) -> None:
    word, bit = divmod(token_id, BITS)
    if word >= len(mask):
        return
    bits = int(mask[word]) & 0xFFFFFFFF
    bits = bits | 1 << bit if is_allowed else bits & ~(1 << bit)
    mask[word] = bits - (bits >> BITS - 1 << BITS)  # as a signed number


def allows(mask: Mask, token_id: int) -> bool:
    """Whether the token's bit is set."""
    word, bit = divmod(token_id, BITS)
    return word < len(mask) and bool(int(mask[word]) >> bit & 1)


def apply(logits: Tensor, places: Sequence[int], masks: Sequence[Mask]) -> None:
    """Rule out, in these rows of logits [rows, V], what their masks do."""
    banned = _banned(masks, logits)
    if logits.device.type == "cpu":
        for place, row in zip(places, banned, strict=True):
            logits[place].masked_fill_(row, float("-inf"))
        return
    index = torch.tensor(list(places), device=logits.device)
    logits[index] = logits[index].masked_fill(banned, float("-inf"))


def likeliest_allowed(
    logits: Tensor,
    places: Sequence[int],
    masks: Sequence[Mask],
    likeliest: Callable[[Tensor], Sampled],
) -> Sampled:
    """The likeliest token that the mask allows, of each of these rows of logits [rows, V], which
    stay as they are. The first one where several are; not finite where there is none."""
    bits, rows = np.stack(masks).view(np.uint32), np.asarray(places)
    are_few = np.bitwise_count(bits).sum(1) <= _FEW
    if logits.device.type != "cpu":
        are_few[:] = False
    token_ids, is_finite = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    few, many = np.flatnonzero(are_few), np.flatnonzero(~are_few)
    if len(few):
        token_ids[few], is_finite[few] = _likeliest_of(logits, rows[few], bits[few])
    if len(many):
        chosen = logits[torch.from_numpy(rows[many]).to(logits.device)]
        chosen.masked_fill_(_banned([masks[i] for i in many.tolist()], logits), float("-inf"))
        token_ids[many], is_finite[many] = likeliest(chosen)
    return Sampled(token_ids, is_finite)


def _likeliest_of(
    logits: Tensor, rows: NDArray[np.int64], bits: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """By the logits of what is allowed alone."""
    place, token = _allowed(bits, logits.shape[1])
    token_ids, is_finite = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    if not len(token):
        return token_ids, is_finite
    index = torch.from_numpy(rows[place]), torch.from_numpy(token)
    values = logits[index].float().numpy()
    there, starts = np.unique(place, return_index=True)
    best = np.maximum.reduceat(values, starts)
    is_finite[there] = np.isfinite(best)
    counts = np.diff(np.append(starts, len(place)))
    are_best = np.flatnonzero(values == np.repeat(best, counts))
    found, first = np.unique(place[are_best], return_index=True)
    token_ids[found] = token[are_best[first]]
    return token_ids, is_finite


def _allowed(
    bits: NDArray[np.uint32], vocabulary: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, token id) of each bit that is set, in order."""
    words = np.flatnonzero(bits.reshape(-1) != 0)
    of_words = np.unpackbits(bits.reshape(-1)[words].view(np.uint8), bitorder="little")
    at, bit = np.divmod(np.flatnonzero(of_words.view(bool)), BITS)
    row, word = np.divmod(words[at], bits.shape[1])
    token = word * BITS + bit
    is_known = token < vocabulary
    return row[is_known], token[is_known]


def _banned(masks: Sequence[Mask], like: Tensor) -> Tensor:
    """[masks, V] what they rule out, ids that only the model knows among them."""
    width = like.shape[1]
    bits = np.unpackbits(np.stack(masks).view(np.uint8), axis=1, bitorder="little")
    banned = np.ones((len(masks), width), bool)
    known = min(width, bits.shape[1])
    np.equal(bits[:, :known], 0, out=banned[:, :known])
    return torch.from_numpy(banned).to(like.device)
