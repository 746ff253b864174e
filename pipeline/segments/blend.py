"""CacheBlend: a row computes again those of its document tokens that differ most from their copies.

Layer 0 runs for all tokens of the documents and of the question, and so do the keys and values of
layer 1, where they are compared with the copies. The share that differs most is written over its
copies from layer 1 on, and goes deeper with the question. Slow, for the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.plan.documents import Arrangement
from pipeline.segments.assembled import Assembler, Batch, SlotCache, mask_of, own_tokens

_COMPARED = 1
"""The layer whose keys and values are compared; the first that has seen other documents."""


@torch.inference_mode()
def run_blend(
    assembler: Assembler,
    copied: Batch,
    repaired: Sequence[Arrangement],
    share: float,
    random: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits [B, V] at the questions' last tokens, tokens of documents that each row computed
    again). `copied`: the rows with all of their documents copied; `repaired`: arranged so that all
    is the rows' own that may be computed again. With `random` the share is drawn."""
    model = assembler.model.base_model
    ids, slots = own_tokens(repaired, copied.filled.shape[1] - 1)
    wide = replace(copied, own_ids=ids, own_slots=slots)
    hidden = _run_layer(model, 0, assembler.embed(ids), wide)
    score = _deviation(model, hidden, wide)
    question = copied.own_slots[:, :1]
    is_document = slots < question
    if random is not None:
        score = torch.rand(score.shape, generator=random)
    count = (is_document.sum(1) * share).round().long()
    order = score.masked_fill(~is_document, -1.0).argsort(1, descending=True)
    rank = order.argsort(1)
    chosen = (is_document & (rank < count[:, None])) | (slots >= question) & (slots < wide.nobody)
    hidden, narrow = _keep(hidden, wide, chosen)
    for layer in range(_COMPARED, len(model.layers)):
        hidden = _run_layer(model, layer, hidden, narrow)
    last = model.norm(hidden[torch.arange(len(hidden)), narrow.last])
    return assembler.model.lm_head(last), count


def _run_layer(model: Any, layer: int, hidden: Tensor, batch: Batch) -> Tensor:
    """hidden [B, n, width] of the batch's own tokens after a layer; their KV is written."""
    result: Tensor = model.layers[layer](
        hidden,
        attention_mask=mask_of(batch, batch.own_slots),
        position_ids=batch.own_slots,
        past_key_values=SlotCache(batch.kv, batch.own_slots),
        use_cache=True,
        position_embeddings=model.rotary_emb(hidden, batch.own_slots),
    )
    return result


def _deviation(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """[B, n] squared distance of the KV that own tokens would have from that in their slots."""
    old = batch.kv[_COMPARED]
    new = [x.clone() for x in old]
    kv = [*batch.kv[:_COMPARED], (new[0], new[1]), *batch.kv[_COMPARED + 1 :]]
    _run_layer(model, _COMPARED, hidden, replace(batch, kv=kv))
    changed = sum((a - b).square().sum((1, 3)) for a, b in zip(new, old, strict=True))
    assert isinstance(changed, Tensor)
    return changed.gather(1, batch.own_slots)


def _keep(hidden: Tensor, batch: Batch, chosen: Tensor) -> tuple[Tensor, Batch]:
    """The chosen own tokens [B, n] alone, still in order of position."""
    width = int(chosen.sum(1).max())
    order = (~chosen).long().argsort(dim=1, stable=True)[:, :width]
    slots = batch.own_slots.masked_fill(~chosen, batch.nobody).gather(1, order)
    kept = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
    return kept, replace(batch, own_ids=batch.own_ids.gather(1, order), own_slots=slots)
