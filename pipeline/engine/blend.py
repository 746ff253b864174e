"""CacheBlend: which tokens of its documents a row computes again (Yao et al., 2405.16444).

A document's first layer knows nothing of what stands before it; the second one does. So the row's
prompt runs through two layers, and the tokens whose keys and values there differ most from those
that are stored, once these stand where the row has them, are computed again:

    score(t) = |K_new(t) - R(shift) K_stored(t)|^2 + |V_new(t) - V_stored(t)|^2

One row at a time, so that its choice depends on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pipeline.engine.rotary import Rotary
from pipeline.model.model import use_own_attention
from pipeline.plan.documents import Reuse

Ids = NDArray[np.int64]
EarlyKV = tuple[Tensor, Tensor]
"""Keys and values [n, H, d] of the compared layer."""
_COMPARED = 1


class _Enough(Exception):
    """The layers that are looked at have run."""


class Blend:
    """Chooses for rows of one job; what is stored of a path is computed once."""

    def __init__(self, model: PreTrainedModel, rotary: Rotary, reuse: Reuse) -> None:
        self._model: Any = model
        self._rotary = rotary
        self._reuse = reuse
        self._stored: dict[bytes, EarlyKV] = {}
        count = model.config.num_hidden_layers
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        self._layers = next(lists)
        self._compared = min(_COMPARED, count - 1)

    @torch.inference_mode()
    def choose(self, preamble: Ids, documents: Sequence[Ids]) -> NDArray[np.int64]:
        """Positions of the row, ascending, as many as `Reuse.count_blended` says."""
        lengths = np.array([len(document) for document in documents], np.int64)
        count = self._reuse.count_blended(lengths)
        if not count:
            return np.zeros(0, np.int64)
        is_below = self._reuse.is_below_preamble
        keys, values = self._early(np.concatenate([preamble, *documents]))
        scores, end = [], len(preamble)
        for number, document in enumerate(documents):
            if number or not is_below:
                before = preamble if is_below else preamble[:0]
                stored, stored_values = self._early_stored(np.concatenate([before, document]))
                own = slice(len(before), None)
                shift = torch.full((len(document),), end - len(before), device=keys.device)
                turned = self._rotary.turn(self._compared, stored[own], shift)
                new = slice(end, end + len(document))
                scores.append(
                    _distance(keys[new], turned) + _distance(values[new], stored_values[own])
                )
            end += len(document)
        score = torch.cat(scores)
        best = score.argsort(descending=True, stable=True)[:count].sort().values
        return best.cpu().numpy() + (end - len(score))

    def _early_stored(self, path: Ids) -> EarlyKV:
        key = path.tobytes()
        if key not in self._stored:
            self._stored[key] = self._early(path)
        return self._stored[key]

    def _early(self, ids: Ids) -> EarlyKV:
        """Of a prompt alone, no deeper than it is looked at."""
        model, cache = self._model, DynamicCache()
        use_own_attention(model)
        deeper = self._layers[self._compared + 1 :]
        hook = deeper[0].register_forward_pre_hook(_stop) if len(deeper) else None
        try:
            model(
                torch.from_numpy(ids)[None].to(model.device),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        except _Enough:
            pass
        finally:
            if hook is not None:
                hook.remove()
        made: Any = cache.layers[self._compared]
        return made.keys[0].transpose(0, 1), made.values[0].transpose(0, 1)


def _stop(*arguments: Any) -> None:
    raise _Enough


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one.float() - other.float()).square().sum((1, 2))
