"""A greedy answer that grows token by token, for baselines that make logits in a way of their own.

What may follow, what a request asks besides, and how an answer ends is as in any other engine.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipeline.engine import guides
from pipeline.engine.base import Grammars, TokenIds
from pipeline.engine.ends import ends_by_token
from pipeline.engine.request_logits import Context, TokenCounts
from pipeline.engine.sampler import Sampler
from pipeline.records import SamplingParams


class GreedyWriter:
    """Of one prompt. `output`: what was said so far; `is_over`: nothing follows."""

    def __init__(
        self,
        sampler: Sampler,
        grammars: Grammars | None,
        params: SamplingParams,
        prompt: TokenIds,
    ) -> None:
        self.output: list[int] = []
        self.is_over = False
        self._sampler = sampler
        self._grammars = grammars
        self._params = params
        self._prompt = prompt
        self._counts = TokenCounts()
        self._guide = guides.open(grammars, params, prompt, sampler.eos)

    def choose(self, logits: Tensor) -> None:
        """The next token, by logits [V]; the end where there is none."""
        scores, guide, params = logits[None].float().clone(), self._guide, self._params
        guides.rule_out(scores, guide)
        key, position = np.zeros(1, np.uint64), np.array([len(self.output)])
        chosen = self._sampler.sample(scores, [params], key, position, self._context)
        if not chosen.is_finite[0]:
            self.is_over = True
            return
        token_id = int(chosen.token_ids[0])
        self.output.append(token_id)
        if guide is not None:
            guides.advance(self._grammars, guide, token_id)
        has_ended = ends_by_token(token_id, params, self._sampler.eos)
        has_ended = has_ended or (guide is not None and guide.is_over)
        self.is_over = has_ended or len(self.output) >= params.max_new_tokens

    def _context(self, _: int) -> Context:
        return Context(self._prompt, self.output, self._counts)
