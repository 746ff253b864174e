"""SAM-KV, after its public port: documents are thinned out, and what is kept is computed again.

A document keeps its first and last tokens and, of the blocks between, those that fit the question
best; a question that the ends fit as well as any block needs no block. What is kept is computed
again by the row, and mixed with a tenth of its copy; the rest is dropped. Slow, for the study.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.plan.documents import Arrangement
from pipeline.segments.assembled import Assembler, Batch

_NEW = 0.9


@dataclass(frozen=True)
class Thinning:
    """Tokens: of the `first` and `last` of a document, of a `block` between; `layers` at the end of
    the model that score them. The port: 64, 128, 64 and 4, for documents of thousands."""

    first: int = 2
    last: int = 4
    block: int = 2
    layers: int = 2


@torch.inference_mode()
def run_sam_kv(
    assembler: Assembler, copied: Batch, rows: Sequence[Arrangement], thinning: Thinning
) -> tuple[Tensor, Tensor]:
    """(logits [B, V] at the questions' last tokens, document tokens that each row computed again).

    `copied`: `rows` with all of their documents copied, none repaired.
    """
    queries, ends = _queries(assembler, copied, rows)
    kept = torch.zeros_like(copied.filled)
    documents = copied.filled.clone()
    for i, row in enumerate(rows):
        documents[i, : len(row.preamble)] = False
        for number in range(len(row.uses)):
            kept[
                i, _kept_slots(assembler, copied, (i, number), row, thinning, queries[i], ends[i])
            ] = 1
    slots_of_question = copied.own_slots
    width = int(kept.sum(1).max())
    order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    is_kept = kept.gather(1, order)
    all_ids = _ids_by_slot(rows, copied)
    slots = torch.cat([order.masked_fill(~is_kept, copied.nobody), slots_of_question], 1)
    slots, by = slots.sort(dim=1, stable=True)
    ids = torch.cat([all_ids.gather(1, order), copied.own_ids], 1).gather(1, by)
    thin = replace(copied.without(documents & ~kept), own_ids=ids, own_slots=slots)
    weight = torch.where(slots < slots_of_question[:, :1], _NEW, 1.0)
    return assembler.run(thin, weight), kept.sum(1)


def _kept_slots(
    assembler: Assembler,
    batch: Batch,
    place: tuple[int, int],
    row: Arrangement,
    thinning: Thinning,
    queries: Tensor,
    ends: Tensor,
) -> list[int]:
    """Slots of one document that stay. queries [layers, H, d] of the question, ends [layers,
    documents, H, d] of each document's last tokens."""  # fmt: skip
    i, number = place
    use = row.uses[number]
    slots = list(range(use.first + use.shift, len(use.path) + use.shift))
    inner = slots[thinning.first : len(slots) - thinning.last]
    outer = [slot for slot in slots if slot not in set(inner)]
    size = thinning.block
    blocks = [inner[at : at + size] for at in range(0, len(inner), size)]
    if not blocks:
        return outer
    layers = range(len(batch.kv))[-thinning.layers :]
    scores, own = torch.zeros(len(blocks)), 0.0
    for layer in layers:
        others = [j for j in range(len(row.uses)) if j != number]
        likeness = functional.cosine_similarity(ends[layer], queries[layer][None], dim=-1).abs()
        wanted = queries[layer]
        if others:
            wanted = wanted + (ends[layer] * likeness[..., None])[others].mean(0)
        means = torch.stack([_mean_key(assembler, batch, i, layer, b) for b in (*blocks, outer)])
        fits = (means * wanted).sum((1, 2))
        scores += fits[:-1]
        own += float(fits[-1])
    spread = float(scores.max() - scores.min())
    share = min(1.0, max(0.0, (float(scores.max()) - own) / spread)) if spread else 1.0
    best = scores.argsort(descending=True)[: round(share * len(blocks))].tolist()
    return outer + [slot for b in best for slot in blocks[b]]


def _mean_key(assembler: Assembler, batch: Batch, row: int, layer: int, slots: list[int]) -> Tensor:
    """[H, d] mean of the keys in some slots, turned back to position 0."""
    keys = batch.kv[layer][0][row][:, slots].transpose(0, 1)
    return assembler.rotary.turn(layer, keys, -torch.tensor(slots)).mean(0)


def _queries(
    assembler: Assembler, batch: Batch, rows: Sequence[Arrangement]
) -> tuple[list[Tensor], list[Tensor]]:
    """By row: mean query of the question [layers, Hkv, d], and of the last token of each document
    [layers, documents, Hkv, d]; heads of a group averaged, without positions."""
    probe = replace(batch, kv=[(k.clone(), v.clone()) for k, v in batch.kv])
    heads = batch.kv[0][0].shape[1], batch.kv[0][0].shape[3]
    with _recorded(assembler.model) as seen:
        assembler.run(probe)
        asked = torch.stack([_by_group(x, *heads) for x in seen])
    is_own = (batch.own_slots < batch.nobody)[None, :, :, None, None]
    mean = (asked * is_own).sum(2) / is_own.sum(2)
    paths = [use.path for row in rows for use in row.uses]
    with _recorded(assembler.model) as seen:
        assembler.encode(paths)
        made = torch.stack([_by_group(x, *heads) for x in seen])
    last = made[:, torch.arange(len(paths)), [len(path) - 1 for path in paths]]
    ends = torch.split(last, [len(row.uses) for row in rows], dim=1)
    return list(mean.transpose(0, 1)), list(ends)


@contextmanager
def _recorded(model: Any) -> Iterator[list[Tensor]]:
    """What the layers' query projections give, in order, while this lasts."""
    seen: list[Tensor] = []
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(out))
        for layer in model.base_model.layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _by_group(projected: Tensor, groups: int, head_dim: int) -> Tensor:
    """[B, n, heads x d] -> [B, n, groups, d]."""
    return projected.view(*projected.shape[:2], groups, -1, head_dim).mean(3)


def _ids_by_slot(rows: Sequence[Arrangement], batch: Batch) -> Tensor:
    """[B, T + 1] ids of the documents' tokens."""
    ids = torch.zeros(batch.filled.shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        for use in row.uses:
            shown = torch.from_numpy(use.path[use.first :].copy())
            ids[i, use.first + use.shift : len(use.path) + use.shift] = shown
    return ids
