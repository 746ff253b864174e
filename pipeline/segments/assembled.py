"""Batches of rows whose KV is put together from copies of their documents, for the study.

Every row has a slot for each of its positions. Slots of documents are filled with copied KV, keys
turned to where they stand; the row's own tokens are computed layer by layer and written over
theirs. A query at position p sees the filled slots up to p. Every arm of the study is a way to fill
slots and a choice of own tokens. The tests compare them with `engine/verify/segment_reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.engine.rotary import Rotary
from pipeline.plan.documents import Arrangement, Ids
from pipeline.segments.lessons import embed

_KEPT = 4
Kv = list[tuple[Tensor, Tensor]]
"""By layer keys and values [rows, H, tokens, d]."""


@dataclass(frozen=True)
class Batch:
    """`kv` [B, H, T + 1, d], the last slot is nobody's; `filled` [B, T + 1] slots that hold copies;
    `own_ids`, `own_slots` [B, n], padded with slot T."""

    kv: Kv
    filled: Tensor
    own_ids: Tensor
    own_slots: Tensor

    @property
    def nobody(self) -> int:
        """The last slot."""
        return self.filled.shape[1] - 1

    @property
    def last(self) -> Tensor:
        """[B] where the question's last token stands among the own tokens."""
        return (self.own_slots < self.nobody).sum(1) - 1

    def without(self, dropped: Tensor) -> Batch:
        """The same, but that nobody sees the copies in slots `dropped` [B, T + 1]."""
        return replace(self, filled=self.filled & ~dropped)


class SlotCache:
    """What a layer's attention takes for its cache: writes new KV to `slots` [B, n], returns all.

    `weight`: of the new against what lay there, by slot [B, n].
    """

    is_compileable = False

    def __init__(self, kv: Kv, slots: Tensor, weight: Tensor | None = None) -> None:
        self._kv = kv
        self._slots = slots
        self._weight = weight

    def get_seq_length(self, layer: int = 0) -> int:
        """No token is known of; positions are given."""
        return 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """keys, values [B, H, n, d] of the own tokens."""
        rows = torch.arange(len(keys))[:, None]
        for held, new in zip(self._kv[layer], (keys, values), strict=True):
            new = new.transpose(1, 2)
            if self._weight is not None:
                old = held[rows, :, self._slots]
                new = new * self._weight[..., None, None] + old * (
                    1 - self._weight[..., None, None]
                )
            held[rows, :, self._slots] = new
        return self._kv[layer]


class Assembler:
    """Of one model. `soft_rows`: embeddings of the ids from the vocabulary's size on."""

    def __init__(self, model: Any, soft_rows: Tensor | None = None) -> None:
        self.model = model
        self.rotary = Rotary.of(model)
        self._soft_rows = soft_rows
        self._known: dict[tuple[bytes, ...], Kv] = {}

    def embed(self, ids: Tensor) -> Tensor:
        """[..., hidden] of token ids and of soft ones."""
        return embed(self.model, ids, self._soft_rows)

    @torch.inference_mode()
    def assemble(self, rows: Sequence[Arrangement], turns: bool = True) -> Batch:
        """Encode what the rows' uses name, each distinct path once, and fill their slots. Without
        `turns` keys stay as they are."""
        paths = _number([path for row in rows for path in _paths(row)])
        made = self._encode_once(tuple(paths))
        ends = [row.runs[-1].position + len(row.runs[-1].token_ids) for row in rows]
        shape = len(rows), max(ends) + 1
        path, local, shift = (np.zeros(shape, np.int64) for _ in range(3))
        filled = np.zeros(shape, bool)
        for i, row in enumerate(rows):
            for ids, first, moved in _copies(row):
                slots = slice(first + moved, len(ids) + moved)
                path[i, slots], shift[i, slots] = paths[ids.tobytes()], moved
                local[i, slots], filled[i, slots] = np.arange(first, len(ids)), True
        source = torch.from_numpy(path), torch.from_numpy(local)
        moved_by = torch.from_numpy(shift).flatten()
        kv = [self._gather(layer, made[layer], source, moved_by if turns else None)
              for layer in range(len(made))]  # fmt: skip
        return Batch(kv, torch.from_numpy(filled), *own_tokens(rows, shape[1] - 1))

    @torch.inference_mode()
    def encode(self, paths: Sequence[Ids]) -> Kv:
        """KV of each path by itself, from position 0 on; padded to the longest."""
        if not paths:
            paths = [np.zeros(1, np.int64)]
        ids = torch.zeros(len(paths), max(map(len, paths)), dtype=torch.int64)
        for i, path in enumerate(paths):
            ids[i, : len(path)] = torch.from_numpy(path.copy())
        cache = DynamicCache()
        self.model.base_model(inputs_embeds=self.embed(ids), past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _encode_once(self, paths: tuple[bytes, ...]) -> Kv:
        """As `encode`; the last are kept, for the study asks many arms for the same rows."""
        if paths not in self._known:
            if len(self._known) == _KEPT:
                del self._known[next(iter(self._known))]
            self._known[paths] = self.encode([np.frombuffer(path, np.int64) for path in paths])
        return self._known[paths]

    @torch.inference_mode()
    def run(self, batch: Batch, weight: Tensor | None = None) -> Tensor:
        """The logits [B, V] at each question's last token; own KV is written into the batch."""
        cache = SlotCache(batch.kv, batch.own_slots, weight)
        hidden = self.model.base_model(
            inputs_embeds=self.embed(batch.own_ids),
            position_ids=batch.own_slots,
            attention_mask=mask_of(batch, batch.own_slots),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits: Tensor = self.model.lm_head(hidden[torch.arange(len(hidden)), batch.last])
        return logits

    def _gather(
        self, layer: int, made: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor],
        shifts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Copies [B, H, T + 1, d] of KV [paths, H, tokens, d]."""
        keys, values = (x.transpose(1, 2)[source] for x in made)
        if shifts is not None:
            keys = self.rotary.turn(layer, keys.flatten(0, 1), shifts).view_as(keys)
        return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


def mask_of(batch: Batch, slots: Tensor) -> Tensor:
    """What is added to the scores [B, 1, n, T + 1] of own tokens in `slots` [B, n]."""
    seen = batch.filled.scatter(1, batch.own_slots, True)
    seen[:, -1] = False
    at = torch.arange(seen.shape[1])
    sees = seen[:, None] & (at <= slots[..., None])
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]


def _number(paths: Sequence[Ids]) -> dict[bytes, int]:
    numbers: dict[bytes, int] = {}
    for path in paths:
        numbers.setdefault(path.tobytes(), len(numbers))
    return numbers


def _paths(row: Arrangement) -> list[Ids]:
    return [ids for ids, _, _ in _copies(row)]


def _copies(row: Arrangement) -> list[tuple[Ids, int, int]]:
    """(path, from which position of it on, by how much it is moved)."""
    before = [(row.preamble, 0, 0)] if len(row.preamble) else []
    return before + [(use.path, use.first, use.shift) for use in row.uses]


def own_tokens(rows: Sequence[Arrangement], nobody: int) -> tuple[Tensor, Tensor]:
    """Own token ids and slots [B, n], in order of position."""
    width = max(sum(len(run.token_ids) for run in row.runs) for row in rows)
    ids, slots = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), nobody)
    for i, row in enumerate(rows):
        own = np.concatenate([run.token_ids for run in row.runs])
        at = [np.arange(run.position, run.position + len(run.token_ids)) for run in row.runs]
        ids[i, : len(own)], slots[i, : len(own)] = own, np.concatenate(at)
    return torch.from_numpy(ids), torch.from_numpy(slots)
