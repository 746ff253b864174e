"""Documents at any position, slowly and obviously: what every mode of reuse is compared with.

One row at a time, by the model's own forward with eager attention. Each document is encoded by
itself, its keys are copied and turned to where it stands in the row, and the row's own tokens run
over these copies under a mask by position. It is the oracle of `plan/documents.py` and of the
engine, and shares two things with them: `Rotary`, which `tests/engine/test_rotary.py` compares with
what models do, and `Blend`, whose near ties must be decided as in the run; `segments/blend.py`
chooses by a program of its own, and `tests/segments/test_modes.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.engine.blend import Blend
from pipeline.engine.rotary import Rotary
from pipeline.engine.soft_rows import SoftRows
from pipeline.plan.documents import Reuse

Ids = NDArray[np.int64]


@dataclass
class _Row:
    """A row under construction: copied KV with its positions, and what is to be computed.

    `copied`: by layer the keys [tokens, H, d] and values of each piece; `positions`: theirs.
    """

    copied: list[list[tuple[Tensor, Tensor]]]
    positions: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    own_positions: list[int] = field(default_factory=list)


class SegmentReference:
    """`soft_rows` [R, hidden]: embeddings of the ids from the vocabulary's size on; None: those
    that the model was given, if any.

    Raises ModelError for a model whose positions are learned or none.
    """

    def __init__(
        self, model: PreTrainedModel, reuse: Reuse, soft_rows: Tensor | None = None
    ) -> None:
        self._model: Any = model
        self._reuse = reuse
        embedding: Any = model.get_input_embeddings()
        if isinstance(embedding, SoftRows):  # its rows are looked up here, not by what is tested
            rows: Any = embedding.rows
            soft_rows, embedding = rows if soft_rows is None else soft_rows, embedding.plain
        self._embedding, self._soft_rows = embedding, soft_rows
        self._rotary = Rotary.of(model)
        self._blend = Blend(model, self._rotary, reuse)

    def forced_logits(self, segments: Sequence[Ids], output: Sequence[int]) -> Tensor:
        """The logits [n, V] that choose each of the n tokens of `output`: those at the question's
        last token, and at each token of the output but the last.

        `segments`: ids of the preamble, of the documents, and of the question, which is not empty.
        """
        row = self._lay_out(segments)
        end = row.own_positions[-1] + 1
        row.own += output[:-1]
        row.own_positions += range(end, end + len(output) - 1)
        cache = DynamicCache()
        for layer, pieces in enumerate(row.copied):
            if pieces:
                keys, values = (
                    torch.cat(x).transpose(0, 1)[None] for x in zip(*pieces, strict=True)
                )
                cache.update(keys, values, layer)
        logits = self._forward(row.own, row.own_positions, row.positions, cache)
        return logits[-len(output) :]

    def generate(self, segments: Sequence[Ids], count: int, stops: Sequence[int] = ()) -> list[int]:
        """At most `count` greedy tokens, each by a whole new run; one of `stops` is the last."""
        output: list[int] = []
        while len(output) < count and not (output and output[-1] in stops):
            output.append(int(self.forced_logits(segments, [*output, 0])[-1].argmax()))
        return output

    def _lay_out(self, segments: Sequence[Ids]) -> _Row:
        """The row as its mode says: the one place here where modes differ."""
        reuse = self._reuse
        preamble, *documents, question = (segment.tolist() for segment in segments)
        chosen = set[int]()
        if reuse.mode == "cacheblend":  # a near tie of scores must be decided as in the run
            chosen = set(self._blend.choose(segments[0], segments[1:-1]).tolist())
        row = _Row([[] for _ in range(self._model.config.num_hidden_layers)])
        if preamble:
            self._copy(row, [], preamble, set(), 0)
        position = len(preamble)
        for number, document in enumerate(documents):
            before = preamble if reuse.is_below_preamble else []
            is_exact = reuse.is_below_preamble and number == 0
            repaired = reuse.epic_tokens if reuse.mode == "epic" and not is_exact else 0
            repaired = min(repaired, len(document))
            first_soft = reuse.vocabulary_size
            if reuse.mode == "packet":
                m = reuse.soft_tokens
                head = [first_soft + i for i in range(m)]
                tail = [first_soft + m + i for i in range(m)]
                document = head + document + tail
            again = {at - position for at in chosen if position <= at < position + len(document)}
            for place in sorted(again | {*range(repaired)}):
                self._own(row, document[place : place + 1], position + place)
            self._copy(row, before, document, again | {*range(repaired)}, position)
            position += len(document)
            if reuse.mode == "kvlink":
                k = reuse.soft_tokens
                self._own(row, [first_soft + k * number + i for i in range(k)], position)
                position += k
        self._own(row, question, position)
        return row

    @staticmethod
    def _own(row: _Row, ids: list[int], position: int) -> None:
        row.own += ids
        row.own_positions += range(position, position + len(ids))

    def _copy(
        self, row: _Row, before: list[int], document: list[int], again: set[int], position: int
    ) -> None:
        """Encode a document behind `before`, and copy it to `position`, but for tokens `again`."""
        cache, path = DynamicCache(), before + document
        self._forward(path, list(range(len(path))), [], cache)
        kept = [place for place in range(len(document)) if place not in again]
        shifts = torch.full((len(kept),), position - len(before), device=self._model.device)
        places = torch.tensor(kept, dtype=torch.int64, device=self._model.device) + len(before)
        for layer, made in enumerate(cache.layers):
            keys, values = (x[0].transpose(0, 1)[places] for x in (made.keys, made.values))
            row.copied[layer].append((self._rotary.turn(layer, keys, shifts), values))
        row.positions += [position + place for place in kept]

    @torch.inference_mode()
    def _forward(self, ids: list[int], positions: list[int], past: list[int], cache: Any) -> Tensor:
        """Logits [len(ids), V] of tokens at `positions` over a cache of keys at `past`."""
        model = self._model
        model.set_attn_implementation("eager")
        at = torch.tensor(positions, device=model.device)
        keys_at = torch.tensor(past + positions, device=model.device)
        logits: Tensor = model(
            inputs_embeds=self._embed(ids)[None],
            position_ids=at[None],
            attention_mask=masks_by_position(model, at, keys_at),
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
        return logits

    def _embed(self, ids: list[int]) -> Tensor:
        model, first_soft = self._model, self._reuse.vocabulary_size
        token_ids = torch.tensor(ids, device=model.device)
        is_soft = token_ids >= first_soft
        embedded: Tensor = self._embedding(token_ids.masked_fill(is_soft, 0))
        if self._soft_rows is not None:
            rows = self._soft_rows.to(embedded)[token_ids[is_soft] - first_soft]
            embedded[is_soft] = rows
        return embedded


def masks_by_position(model: Any, queries: Tensor, keys: Tensor) -> Any:
    """What eager attention adds to its scores [1, 1, queries, keys], given all positions; by type
    of layer where a model's layers differ."""
    age = queries[:, None] - keys
    return as_masks(model, age, age >= 0)


def as_masks(model: Any, age: Tensor, seen: Tensor) -> Any:
    """`age` [.., queries, keys]: by how much a key is older; `seen`: where it may be looked at."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    near = seen & (age < window) if window else seen
    full, sliding = (
        torch.zeros(see.shape, dtype=model.dtype, device=see.device)
        .masked_fill(~see, torch.finfo(model.dtype).min)
        .reshape(-1, 1, *see.shape[-2:])
        for see in (seen, near)
    )
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds == {"full_attention"} or not window:
        return full
    if "full_attention" in kinds or "sliding_attention" in kinds:
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding
