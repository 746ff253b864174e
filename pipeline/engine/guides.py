"""What an answer may say next: anything while it thinks, then what its grammar allows.

```
 thinking (free, at most its budget) ─► end tag ─► grammar: masks, forced tokens ─► it is over
 └── where the prompt opens it, or the answer begins with the tag
```

A guide knows token ids alone; what they say the caller's `Grammars` know. Of one prompt, one set of
parameters and the same tokens it always says the same, whoever asks: the engine, the baseline, an
audit. Whether one token may follow is asked for less than the mask of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from pipeline.engine import masks
from pipeline.engine.base import Grammars, TokenIds
from pipeline.engine.grammars import Matcher
from pipeline.engine.masks import BITS, Mask, set_bit
from pipeline.engine.thinking import Thinking
from pipeline.records import SamplingParams

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
        self._may_say_end = not params.ignore_eos
        self.fault: str | None = None
        self.mask: Mask | None = None
        self._matcher: Matcher | None = None
        tags = grammars.tags
        thinking = None if tags is None else Thinking(tags, params, prompt)
        self._thinking = None if thinking is None or thinking.is_past else thinking
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
        thinks = self._thinking is not None and bool(self._thinking.forced)
        return self.fault is None and (self._matcher is not None or thinks)

    @property
    def is_over(self) -> bool:
        matcher = self.matcher
        if matcher is None or self.fault is not None:
            return False
        return matcher.is_over or self._only_ends

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete as it is; what else may follow its mask says."""
        matcher = self.matcher
        return matcher is not None and self.fault is None and matcher.may_end

    @property
    def _only_ends(self) -> bool:
        """By the mask, which must be that of the next token: only an end may follow."""
        if self.mask is None or not self.may_end:
            return False
        others = self.mask.copy()
        for token_id in self._eos:
            set_bit(others, token_id, False)
        return not others.any()

    @property
    def matcher(self) -> Matcher | None:
        """The grammar, where it decides about the next token."""
        thinking = self._thinking
        if thinking is not None and (thinking.is_open or thinking.forced):
            return None
        return self._matcher

    def forced(self) -> list[int]:
        """The only tokens that may follow, one after the other; none where there is a choice."""
        thinking = self._thinking
        if self.fault is not None:
            return []
        if thinking is not None:
            return list(thinking.forced)
        return [] if self._matcher is None else self._matcher.forced()

    def next_forced(self) -> int | None:
        """The first of them."""
        thinking = self._thinking
        if thinking is not None:
            return thinking.forced[0] if thinking.forced else None
        if self._matcher is None or self.fault is not None:
            return None
        return self._matcher.next_forced()

    def allows(self, token_id: int) -> bool:
        """Whether the token may follow, as its bit in the mask would say."""
        thinking = self._thinking
        if self.fault is not None:
            return False
        if self.mask is not None:
            return masks.allows(self.mask, token_id)
        if thinking is not None and thinking.forced:
            return token_id == thinking.forced[0]
        is_open = thinking is not None and thinking.is_open
        if token_id in self._eos:
            return self._may_say_end and self._is_answered(is_open)
        if self._matcher is None or is_open:
            return True
        if thinking is not None and thinking.may_begin and token_id == thinking.begin[0]:
            return True
        return self._matcher.allows(token_id)

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self.mask = None
        if self._thinking is not None and self._takes(self._thinking, token_id):
            return
        if self._matcher is None or (token_id in self._eos and self._may_say_end):
            return
        fault = self._matcher.accept(token_id)
        self.fault = self.fault or fault

    def _takes(self, thinking: Thinking, token_id: int) -> bool:
        if thinking.forced and token_id != thinking.forced[0]:
            self.fault = self.fault or "a token of a tag of thinking is another one"
        taken = thinking.takes(token_id)
        if thinking.is_past:
            self._thinking = None
        return taken

    def complete(self, mask: Mask) -> None:
        """Take the mask of the next token, in which the grammar, where it decides, has set its own
        bits."""
        thinking = self._thinking
        if thinking is not None and thinking.forced:
            mask[:] = 0
            set_bit(mask, thinking.forced[0], True)
        else:
            is_open = thinking is not None and thinking.is_open
            if is_open:
                mask[:] = -1
            if self._eos:
                may_end = self._may_say_end and self._is_answered(is_open)
                for token_id in self._eos:
                    set_bit(mask, token_id, may_end)
            if thinking is not None and thinking.may_begin:
                set_bit(mask, thinking.begin[0], True)
        self.mask = mask

    def _is_answered(self, is_thinking: bool) -> bool:
        """Whether an end may follow, thinking or not."""
        return self._matcher is None or (not is_thinking and self._matcher.may_end)


def prepare(grammars: Grammars, guides: Sequence[Guide], vocabulary: int) -> None:
    """Give each guide the mask of its next token, those of grammars all together; `vocabulary`:
    token ids that a model has logits of."""
    masking = [guide for guide in guides if guide.mask is None and guide.is_masking]
    if not masking:
        return
    words = -(-max(vocabulary, grammars.vocabulary_size) // BITS)
    found = np.zeros((len(masking), words), np.int32)
    matchers = [(i, guide.matcher) for i, guide in enumerate(masking)]
    asked = [(i, matcher) for i, matcher in matchers if matcher is not None]
    if asked:
        filled = grammars.fill([matcher for _, matcher in asked])
        found[[i for i, _ in asked], : filled.shape[1]] = filled
    for mask, guide in zip(found, masking, strict=True):
        guide.complete(mask)


def rule_out(logits: Tensor, guide: Guide | None) -> None:
    """Rule out in place, in logits [1, V], what may not follow."""
    if guide is not None and guide.mask is not None:
        masks.apply(logits, [0], [guide.mask])


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
    places, found = [], []
    for place, token_id in enumerate(output):
        if guide.fault is not None or guide.is_over:
            break
        if guide.mask is not None:
            places.append(place)
            found.append(guide.mask)
        advance(grammars, guide, token_id)
    logits = logits.clone()
    if places:
        masks.apply(logits, places, found)
    return logits
