"""A "model" of one line of arithmetic behind `Baseline`, and an honest product of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.audit.replay import AuditInput
from pipeline.engine.base import Replay
from pipeline.records import SamplingParams

VOCABULARY = 32
EOS = 0


def noise(noise_key: int, at: int) -> float:
    """In [0, 1)."""
    return float(np.random.default_rng((noise_key, at)).random())


class RuleModel:
    """The next token depends on the last two and on the position; `gap` nats separate the best two.

    Sampled rows: the noise, which depends on (noise key, output position) alone, picks from the
    cumulative distribution.
    """

    def __init__(self, gap: float = 2.0) -> None:
        self.gap = gap

    def logprobs(self, context: Sequence[int]) -> NDArray[np.float64]:
        """[vocabulary] log-probabilities after `context`."""
        position = len(context)
        best = (7 * context[-1] + 5 * context[-2] + 3 * position) % VOCABULARY
        second = (best + 1) % VOCABULARY
        logits = np.full(VOCABULARY, -10.0)
        logits[best], logits[second] = 0.0, -self.gap
        return logits - np.log(np.exp(logits).sum())

    def cumulative(self, context: Sequence[int], params: SamplingParams) -> NDArray[np.float64]:
        """[1 + vocabulary] token t owns the mass [c[t], c[t + 1])."""
        mass = np.exp(self.logprobs(context) / params.temperature)
        return np.concatenate([[0.0], np.cumsum(mass / mass.sum())])

    def next_token(
        self, context: Sequence[int], at: int, params: SamplingParams, noise_key: int
    ) -> int:
        """The token at output position `at`."""
        if params.is_greedy:
            return int(self.logprobs(context).argmax())
        below = self.cumulative(context, params)[1:-1] <= noise(noise_key, at)
        return int(below.sum())

    def replay(
        self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, noise_key: int
    ) -> Replay:
        rows = []
        for at, token in enumerate(output):
            context = [*prompt, *output[:at]]
            predicted = self.next_token(context, at, params, noise_key)
            logprobs = self.logprobs(context)
            if params.is_greedy:
                second, first = np.sort(logprobs)[-2:]
                distances = (first - second, first - logprobs[token])
            else:
                edges, drawn = self.cumulative(context, params), noise(noise_key, at)
                own = (drawn - edges[predicted], edges[predicted + 1] - drawn)
                distances = (min(own), max(edges[token] - drawn, drawn - edges[token + 1], 0.0))
            rows.append((predicted, logprobs[token], *distances))
        predicted_ids, *floats = np.array(rows).reshape(-1, 4).T
        return Replay(predicted_ids.astype(np.int64), *floats)

    def generate_one(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        return self.write(prompt, params, noise_key=0)

    def write(
        self, prompt: Sequence[int], params: SamplingParams, noise_key: int
    ) -> tuple[int, ...]:
        """The whole answer, greedy or sampled."""
        context = list(prompt)
        for at in range(params.max_new_tokens):
            context.append(self.next_token(context, at, params, noise_key))
            if context[-1] == EOS and not params.ignore_eos:
                break
        return tuple(context[len(prompt) :])


def honest_row(
    model: RuleModel, prompt: Sequence[int], params: SamplingParams, noise_key: int = 0
) -> AuditInput:
    """What a faultless product would have written for `prompt`."""
    output = model.write(prompt, params, noise_key)
    ended = output[-1] == EOS and not params.ignore_eos
    row = AuditInput(0, prompt, output, params, "stop" if ended else "length", noise_key)
    return replace(row, eos_token_ids=frozenset({EOS}))
