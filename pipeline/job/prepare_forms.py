"""Rows that say what their answers must be: whether that can be kept, and what is forced by it.

```
 parameters ─► compiled apart ─► refused, or ─► what every answer begins with ─► ends the prompt
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.constraints import schema_of
from pipeline.generation import may_rule_out
from pipeline.plan.openings import append_openings, opened
from pipeline.prompts import ChatPrompt, Content, PromptBatch, Rejected
from pipeline.records import SamplingParams
from pipeline.tokens.constraint_check import ConstraintChecker
from pipeline.tokens.tokenizer import PromptTokenizer

Openings = Mapping[str, tuple[int, ...]]
"""By constraint, what every answer under it begins with."""


class Forms:
    """Of one tokenizer."""

    def __init__(self, tokenizer: PromptTokenizer, checker: ConstraintChecker) -> None:
        self._tokenizer = tokenizer
        self._checker = checker
        self._is_stopped = lru_cache(4096)(tokenizer.answers.is_stopped)

    def check(
        self, batch: PromptBatch, params: list[SamplingParams], rejected: dict[int, Rejected]
    ) -> Openings:
        """Refuses rows that ask for what cannot be kept, and makes their parameters plain; empty
        where no row asks for anything."""
        distinct = {id(p): p for p in params}.values()  # of a million rows, which say the same
        if not any(p.is_guided for p in distinct):
            return {}
        checked = self._checker.check(p.constraint for p in distinct)
        has_tags = self._tokenizer.grammars.tags is not None
        for index, (content, chosen) in enumerate(zip(batch.contents, params, strict=True)):
            row, kind = batch.row_start + index, "BadSamplingParams"
            reason = checked[chosen.constraint].reason
            if reason is not None:
                kind = "BadConstraint"
            elif chosen.thinking_budget is not None and not has_tags:
                reason = "thinking_budget means nothing to a model without tags of thinking"
            elif _may_call(content) and schema_of(chosen.constraint) is not None:
                reason = (
                    "the row has tools, and its answer must be JSON of a schema, which calls none; "
                    "leave one of the two out, or say tool_choice: none"
                )
            if reason is not None:
                rejected.setdefault(row, Rejected(row, kind, reason))
                params[index] = SamplingParams()
        return {"": ()} | {constraint: found.opening for constraint, found in checked.items()}

    def open(
        self,
        prompts: tuple[NDArray[np.uint32], NDArray[np.int64]],
        params: list[SamplingParams],
        openings: Openings,
        segments: dict[int, list[int]],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """(flat, lengths) of prompts that end with the openings of their answers; what `params` and
        `segments` say of them goes by that.

        No prompt that nothing is left of, and none after which the model thinks, or stops in the
        middle.
        """
        flat, lengths = prompts
        tags, ends = self._tokenizer.grammars.tags, np.cumsum(lengths)
        known: dict[SamplingParams, SamplingParams] = {}
        for index, chosen in enumerate(params):
            if not openings[chosen.constraint] or not lengths[index] or not _opens(chosen):
                continue
            prompt = flat[ends[index] - lengths[index] : ends[index]]
            if tags is not None and tags.is_open(prompt):
                continue
            if chosen.stop and self._stops(prompt, openings[chosen.constraint], chosen.stop):
                continue
            if chosen not in known:
                known[chosen] = opened(chosen, openings[chosen.constraint])
            params[index] = known[chosen]
            if index in segments:
                segments[index][-1] += len(params[index].opening)
        return append_openings(flat, lengths, params)

    def _stops(
        self, prompt: NDArray[np.uint32], opening: tuple[int, ...], stop: tuple[str, ...]
    ) -> bool:
        """Whether a stop string ends in the opening; of prompts, most end alike."""
        return self._is_stopped(opening, stop, self._tokenizer.answers.tail(prompt, stop))


def _may_call(content: Content | None) -> bool:
    return isinstance(content, ChatPrompt) and "tools" in json.loads(content.given)


def _opens(params: SamplingParams) -> bool:
    """Whether nothing else asks to see the first tokens of the answer one by one, or for their
    log-probabilities, which KV that is there already does not have."""
    asks = params.thinking_budget is not None or params.logprobs is not None
    return not asks and not may_rule_out(params)
