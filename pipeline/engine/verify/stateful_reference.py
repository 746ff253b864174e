"""Conversations that give up tokens, slowly and obviously: what the engine's are compared with.

Queries and keys are kept as they are before any rotary embedding, of every token that was ever
computed, and keys are turned anew to where they stand whenever they are looked at (as StreamingLLM
does):

```
 positions  a kept key i stands at     the next token t, n being kept, at
 gap        i                          t
 rerotate   its rank, 0 .. n - 1       n
 stale      where it was made          n      the wrong one: positions are used twice
```

The model's own forward runs, with every token at position 0, where rotary embeddings do nothing.
Of the engine it shares `Rotary`, which `tests/engine/test_rotary.py` compares with what models do.
`time_mask` is a second way to "gap" that shares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.engine.eviction import mask_of
from pipeline.engine.rotary import Rotary
from pipeline.records import EvictionEvent

Ids = NDArray[np.int64]
SlowPositions = Literal["auto", "gap", "rerotate", "stale"]
_NAME = "coppice_slow_conversation"
_SAFE_SHARE = 0.9  # of the window, up to which "auto" leaves gaps
_ANY_SPAN = 1e12


class SlowConversation:
    """One conversation, computed token by token or in stretches between two evictions.

    `computed` tokens so far, of which those with the numbers `kept` are seen, [n] or [layers,
    kv_heads, n]. `window`: of the model, for "auto". Raises ModelError for a model whose positions
    are learned or none.
    """

    def __init__(
        self, model: PreTrainedModel, positions: SlowPositions = "gap", window: int = 0
    ) -> None:
        self._model: Any = model
        rotary = Rotary.of(model)
        self._layers = [_Layer(i, rotary) for i in range(model.config.num_hidden_layers)]
        self._is_stale = positions == "stale"
        self._safe_span = _SAFE_SHARE * window if positions == "auto" else _ANY_SPAN
        self.lies_together = positions == "rerotate"
        self.computed = 0
        self.counted_from = 0  # queries before this token count for no mean
        self.kept: Ids = np.zeros(0, np.int64)
        self._made: Ids = np.zeros(0, np.int64)  # by number, where each token was computed

    @property
    def stands(self) -> Ids:
        """Where what is kept stands when the next token comes, as `kept`."""
        if self._is_stale:
            return self._made[self.kept]
        if self.lies_together:
            return np.broadcast_to(np.arange(self.kept.shape[-1]), self.kept.shape)
        return self.kept

    @property
    def query(self) -> int:
        """Where the next token stands."""
        is_counted = self.lies_together or self._is_stale
        return self.kept.shape[-1] if is_counted else self.computed

    def feed(self, ids: Sequence[int] | Ids) -> Tensor:
        """Compute the next tokens; their logits [n, V]."""
        rest, parts = [int(i) for i in ids], []
        while rest:
            self.expect(1)
            count = len(rest) if self.lies_together else min(len(rest), int(self._safe_room))
            parts.append(self._forward(rest[:count]))
            rest = rest[count:]
        return torch.cat(parts)

    def expect(self, count: int) -> None:
        """So many tokens will come next: "auto" closes the gaps where they would lie too far from
        the first that is kept."""
        self.lies_together |= self._safe_room < count

    def keep(self, kept: Ids) -> None:
        """From now on these alone are seen."""
        self.kept = kept

    def apply(self, event: EvictionEvent) -> None:
        """An eviction that was written down."""
        kept = self.kept
        if len(event.kept) > 1 and kept.ndim == 1:
            kept = self.by_head(kept)
        self.keep(kept[mask_of(event, kept)].reshape(*kept.shape[:-1], -1))

    def by_head(self, kept: Ids) -> Ids:
        """[n], or [layers, kv_heads, n] -> the latter."""
        shape = (len(self._layers), self._layers[0].heads, kept.shape[-1])
        return np.broadcast_to(kept, shape).copy()

    def weights(self, numbers: Ids) -> Tensor:
        """[layers, kv_heads, queries, kept] float32: how the tokens with these numbers, standing
        where they do among what is kept, look at it up to themselves."""
        kept, stands = self.by_head(self.kept), self.by_head(self.stands)
        is_counted = self.lies_together or self._is_stale
        every = []
        for layer, seen, at in zip(self._layers, kept, stands, strict=True):
            ranks = [np.searchsorted(head, numbers) for head in seen]
            own = (
                np.stack(ranks)
                if is_counted
                else np.broadcast_to(numbers, (len(seen), len(numbers)))
            )
            every.append(torch.stack([p.mean(0) for p in layer.look(numbers, own, seen, at)]))
        return torch.stack(every)

    def means(self) -> NDArray[np.float32]:
        """[layers, kv_heads, kept]: the mean weight that each kept token got from the queries that
        could see it, when they were computed; not from those before `counted_from`."""
        sums, counts = (
            np.stack([getattr(layer, name) for layer in self._layers])
            for name in ("sums", "counts")
        )
        mean: NDArray[np.float64] = sums / np.maximum(counts, 1)
        return np.take_along_axis(mean, self.by_head(self.kept), -1).astype(np.float32)

    def attend(self, number: int, made: Sequence[Tensor], rules: dict[str, Any]) -> Tensor:
        """In layer `number`, the queries, keys and values [n, H, d] that tokens have just `made`:
        what they attend to, [n, Hq, d]."""
        layer, count = self._layers[number], len(made[0])
        layer.add(made, rules)
        numbers = np.arange(self.computed, self.computed + count)
        at = np.arange(self.query, self.query + count)
        kept, stands = self.by_head(self.kept)[number], self.by_head(self.stands)[number]
        new, new_at = (np.broadcast_to(x, (len(kept), count)) for x in (numbers, at))
        seen, seen_at = np.concatenate([kept, new], -1), np.concatenate([stands, new_at], -1)
        return layer.attend(numbers, new_at, seen, seen_at, self.counted_from)

    @property
    def _safe_room(self) -> float:
        """As many more tokens are within the safe span of the first that is kept."""
        first = int(self.kept.min(initial=self.computed))
        return self._safe_span - (self.computed - first)

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Tensor:
        model = self._model
        model.set_attn_implementation(_NAME)
        tokens = torch.tensor([ids], device=model.device)
        at_first = torch.zeros_like(tokens)
        logits: Tensor = model(
            input_ids=tokens, position_ids=at_first, use_cache=False, slow_conversation=self
        ).logits[0]
        new = np.arange(self.computed, self.computed + len(ids))
        self._made = np.append(self._made, np.arange(self.query, self.query + len(ids)))
        every = np.broadcast_to(new, (*self.kept.shape[:-1], len(ids)))
        self.kept = np.concatenate([self.kept, every], -1)
        self.computed += len(ids)
        return logits


class _Layer:
    """All that one layer has made: `sums` of the weights that each token got, and `counts` of the
    queries that could see it, [kv_heads, tokens]."""

    def __init__(self, number: int, rotary: Rotary) -> None:
        self._number = number
        self._rotary = rotary
        self._made: list[Tensor] = []
        self._rules: dict[str, Any] = {}
        self.heads = 1  # until the first token says
        self.sums, self.counts = np.zeros((2, 1, 0))

    def add(self, made: Sequence[Tensor], rules: dict[str, Any]) -> None:
        """Queries, keys and values [n, H, d], unrotated."""
        before = self._made or [x[:0] for x in made]
        self._made = [torch.cat(x) for x in zip(before, made, strict=True)]
        self._rules, self.heads = rules, made[1].shape[1]
        more = np.zeros((self.heads, len(made[0])))
        self.sums, self.counts = (
            np.concatenate([np.broadcast_to(x, (self.heads, x.shape[1])), more], 1)
            for x in (self.sums, self.counts)
        )

    def attend(self, numbers: Ids, at: Ids, seen: Ids, seen_at: Ids, counted_from: int) -> Tensor:
        """[n, Hq, d], and note what every token got from tokens `counted_from` on."""
        out, counted = [], numbers >= counted_from
        for head, p in enumerate(self.look(numbers, at, seen, seen_at)):
            out.append(p @ self._made[2][seen[head], head].float())
            self.sums[head, seen[head]] += p.mean(0)[counted].sum(0).double().cpu().numpy()
            self.counts[head, seen[head]] += (seen[head] <= numbers[counted, None]).sum(0)
        return torch.cat(out).transpose(0, 1).to(self._made[2].dtype)

    def look(self, numbers: Ids, at: Ids, seen: Ids, seen_at: Ids) -> list[Tensor]:
        """By KV head, the weights [query heads, queries, keys] of tokens `numbers` [n] at positions
        `at` [kv_heads, n], on tokens `seen` at `seen_at` [kv_heads, keys]."""
        rules, weights = self._rules, []
        queries, keys, _ = self._made
        group = queries.shape[1] // self.heads
        for head in range(self.heads):
            mine = slice(head * group, (head + 1) * group)
            query = self._turned(queries[numbers, mine], at[head])
            key = self._turned(keys[seen[head], head : head + 1], seen_at[head])
            scores = query.transpose(0, 1) @ key[:, 0].T * rules["scale"]
            if rules["softcap"]:
                scores = rules["softcap"] * torch.tanh(scores / rules["softcap"])
            hidden = seen[head] > numbers[:, None]
            if rules["window"]:
                hidden |= at[head][:, None] - seen_at[head] >= rules["window"]
            scores = scores.masked_fill(torch.from_numpy(hidden).to(scores.device), float("-inf"))
            if rules["sinks"] is not None:
                sinks = rules["sinks"].float()[mine, None, None].expand(*scores.shape[:2], 1)
                scores = torch.cat([scores, sinks], -1)
            weights.append(torch.softmax(scores, -1)[..., : len(key)])
        return weights

    def _turned(self, heads: Tensor, at: Ids) -> Tensor:
        positions = torch.tensor(np.array(at), device=heads.device)
        return self._rotary.turn(self._number, heads.float(), positions)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slow_conversation: SlowConversation | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, n, d]; key, value [1, Hkv, n, d], all at position 0."""
    assert slow_conversation is not None
    rules = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "window": options.get("sliding_window", getattr(module, "sliding_window", None)),
    }
    made = [x[0].transpose(0, 1) for x in (query, key, value)]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return slow_conversation.attend(layer, made, rules)[None], None


AttentionInterface.register(_NAME, _attend)


def replayed_logits(
    conversation: SlowConversation,
    ids: Ids,
    log: Sequence[EvictionEvent],
    expected: Sequence[tuple[int, int]] = (),
    one_by_one: bool = False,
) -> Tensor:
    """Of all tokens of a conversation that gave up tokens as its `log` says, [n, V]. `expected`:
    before which token how many were said to come."""
    coming, due = dict(expected), list(log)
    edges = {0, len(ids), *coming, *(event.at for event in log)}
    edges = {*range(len(ids) + 1)} if one_by_one else {edge for edge in edges if edge <= len(ids)}
    logits = []
    for low, high in pairwise(sorted(edges)):
        while due and due[0].at <= low:
            conversation.apply(due.pop(0))
        conversation.expect(coming.get(low, 1))
        logits.append(conversation.feed(ids[low:high]))
    return torch.cat(logits)
