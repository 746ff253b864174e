"""What an answer may say next: anything while it thinks, then what its grammar allows.

```
 thinking (free, at most its budget) ─► end tag ─► grammar: masks, forced tokens ─► it is over
 └── where the prompt opens it, or the answer begins with the tag
```

A guide knows token ids alone; what they say the caller's `Grammars` know. Of one prompt, one set of
parameters and the same tokens it always says the same, whoever asks: the engine, the baseline, an
audit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.base import Grammars, TokenIds
from pipeline.engine.grammars import Matcher
from pipeline.engine.thinking import Thinking
from pipeline.records import SamplingParams

Mask = NDArray[np.int32]
"""[words] a bit for each token id, the first id lowest."""
_BITS: Final = 32
NO_TOKEN: Final = "no token may follow here by what the answer must be"


class Guide:
    """Of one answer. `is_over`: it is complete, and nothing may follow."""

    def __init__(
        self,
        grammars: Grammars,
        params: SamplingParams,
        prompt: TokenIds,
        eos: frozenset[int],
    ) -> None:
        """`prompt`: with the opening, if there is one. `fault`: why the answer cannot go on."""
        self._eos = eos
        self._may_end = not params.ignore_eos
        self.fault: str | None = None
        self.mask: Mask | None = None
        self._matcher: Matcher | None = None
        self._thinking = Thinking(grammars, params, prompt)
        try:
            if params.constraint:
                self._matcher = grammars.matcher(params.constraint)
        except ValueError as error:
            self.fault = str(error)
        for token_id in params.opening:
            self.accept(token_id)

    @property
    def is_masking(self) -> bool:
        """Whether some token is ruled out now."""
        return self._matcher is not None or bool(self._thinking.forced)

    @property
    def is_over(self) -> bool:
        if self._matcher is None or self._thinking.is_open or self.fault is not None:
            return False
        return self._matcher.is_over or self._only_ends

    @property
    def _only_ends(self) -> bool:
        """By the mask, which must be that of the next token: only an end may follow."""
        if self.mask is None or self._matcher is None or not self._matcher.may_end:
            return False
        others = self.mask.copy()
        for token_id in self._eos:
            _set(others, token_id, False)
        return not others.any()

    @property
    def matcher(self) -> Matcher | None:
        """The grammar, where it decides about the next token."""
        return None if self._thinking.is_open or self._thinking.forced else self._matcher

    def forced(self) -> list[int]:
        """The only tokens that may follow, one after the other; none where there is a choice."""
        if self.fault is not None:
            return []
        if self._thinking.forced:
            return list(self._thinking.forced)
        if self._thinking.is_open or self._thinking.may_begin or self._matcher is None:
            return []
        return self._matcher.forced()

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self.mask = None
        forced = self._thinking.forced
        if forced and token_id != forced[0]:
            self.fault = self.fault or "a token of a tag of thinking is another one"
        if self._thinking.takes(token_id) or self._matcher is None:
            return
        if token_id in self._eos and self._may_end:
            return
        self.fault = self.fault or self._matcher.accept(token_id)

    def complete(self, mask: Mask) -> None:
        """Take the mask of the next token, in which the grammar, where it decides, has set its own
        bits."""
        thinking = self._thinking
        if thinking.forced:
            mask[:] = 0
            _set(mask, thinking.forced[0], True)
        elif thinking.is_open:
            mask[:] = -1
            self._allow_end(mask, self._matcher is None)
        else:
            self._allow_end(mask, self._matcher is None or self._matcher.may_end)
            if thinking.may_begin:
                _set(mask, thinking.begin[0], True)
        self.mask = mask

    def _allow_end(self, mask: Mask, is_allowed: bool) -> None:
        for token_id in self._eos:
            _set(mask, token_id, is_allowed and self._may_end)


def _set(mask: Mask, token_id: int, is_allowed: bool) -> None:
    word, bit = divmod(token_id, _BITS)
    if word >= len(mask):
        return
    bits = int(mask[word]) & 0xFFFFFFFF
    bits = bits | 1 << bit if is_allowed else bits & ~(1 << bit)
    mask[word] = bits - (bits >> _BITS - 1 << _BITS)  # as a signed number


def allows(mask: Mask, token_id: int) -> bool:
    """Whether the token's bit is set."""
    word, bit = divmod(token_id, _BITS)
    return word < len(mask) and bool(int(mask[word]) >> bit & 1)


def prepare(grammars: Grammars, guides: Sequence[Guide], vocabulary: int) -> None:
    """Give each guide the mask of its next token, those of grammars all together; `vocabulary`:
    token ids that a model has logits of."""
    masking = [guide for guide in guides if guide.is_masking and guide.fault is None]
    if not masking:
        return
    words = -(-max(vocabulary, grammars.vocabulary_size) // _BITS)
    masks = np.zeros((len(masking), words), np.int32)
    asked = [(i, guide.matcher) for i, guide in enumerate(masking)]
    by_grammar = [(i, matcher) for i, matcher in asked if matcher is not None]
    if by_grammar:
        filled = grammars.fill([matcher for _, matcher in by_grammar])
        masks[[i for i, _ in by_grammar], : filled.shape[1]] = filled
    for mask, guide in zip(masks, masking, strict=True):
        guide.complete(mask)


def apply(logits: Tensor, places: Sequence[int], masks: Sequence[Mask]) -> None:
    """Rule out, in these rows of logits [rows, V], what their masks do."""
    width = logits.shape[1]
    bits = np.unpackbits(np.stack(masks).view(np.uint8), axis=1, bitorder="little")
    banned = np.ones((len(masks), width), bool)  # also ids that only the model knows
    known = min(width, bits.shape[1])
    np.equal(bits[:, :known], 0, out=banned[:, :known])
    there = torch.from_numpy(banned).to(logits.device)
    if logits.device.type == "cpu":
        for place, row in zip(places, there, strict=True):
            logits[place].masked_fill_(row, float("-inf"))
        return
    index = torch.tensor(list(places), device=logits.device)
    logits[index] = logits[index].masked_fill(there, float("-inf"))


def open(
    grammars: Grammars | None, params: SamplingParams, prompt: TokenIds, eos: frozenset[int]
) -> Guide | None:
    """With the mask of the first token; None where nothing guides the answer."""
    if grammars is None or not params.is_guided:
        return None
    guide = Guide(grammars, params, prompt, eos)
    prepare(grammars, [guide], grammars.vocabulary_size)
    return guide


def advance(grammars: Grammars | None, guide: Guide, token_id: int) -> None:
    """Take a token, and make the mask of the next one."""
    assert grammars is not None
    guide.accept(token_id)
    prepare(grammars, [guide], grammars.vocabulary_size)


class GreedyWriter:
    """An answer that grows by the likeliest token that may follow, for baselines of all kinds."""

    def __init__(
        self,
        grammars: Grammars | None,
        params: SamplingParams,
        prompt: TokenIds,
        eos: frozenset[int],
    ) -> None:
        self.output: list[int] = []
        self.is_over = False
        self._grammars = grammars
        self._params = params
        self._ends = frozenset() if params.ignore_eos else eos
        self._guide = open(grammars, params, prompt, eos)

    def choose(self, logits: Tensor) -> None:
        """The next token, by logits [V]."""
        guide = self._guide
        if guide is not None and guide.mask is not None:
            logits = logits.clone()
            apply(logits.unsqueeze(0), [0], [guide.mask])
        self.output.append(int(logits.argmax()))
        if guide is not None:
            advance(self._grammars, guide, self.output[-1])
        has_ended = self.output[-1] in self._ends or (guide is not None and guide.is_over)
        self.is_over = has_ended or len(self.output) >= self._params.max_new_tokens


def over_at(
    grammars: Grammars | None,
    params: SamplingParams,
    prompt: TokenIds,
    output: Sequence[int],
    eos: frozenset[int],
) -> int | None:
    """After how many tokens of an answer it is over by its grammar; None: it is not."""
    guide = open(grammars, params, prompt, eos)
    for number, token_id in enumerate(output if guide is not None else (), 1):
        assert guide is not None
        advance(grammars, guide, token_id)
        if guide.is_over:
            return number
    return None


def mask_answer(
    logits: Tensor,
    grammars: Grammars | None,
    params: SamplingParams,
    context: tuple[TokenIds, Sequence[int]],
    eos: frozenset[int],
) -> Tensor:
    """Logits [n, V] that choose each token of an answer, without what was ruled out there.

    `context`: its prompt and the answer. Behind a token that may not be there nothing is ruled out.
    """
    prompt, output = context
    if grammars is None or not params.is_guided or not len(output):
        return logits
    guide = open(grammars, params, prompt, eos)
    assert guide is not None
    places, masks = [], []
    for place, token_id in enumerate(output):
        if guide.fault is not None or guide.is_over:
            break
        if guide.mask is not None:
            places.append(place)
            masks.append(guide.mask)
        advance(grammars, guide, token_id)
    logits = logits.clone()
    if places:
        apply(logits, places, masks)
    return logits
