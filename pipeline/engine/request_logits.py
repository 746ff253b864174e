"""What requests ask of logits, with vLLM's meaning and in its order. Knows no plan and no device.

```
 allowed_token_ids ─► bad_words ─► min_tokens ─► logit_bias ─► repetition_penalty
                                                    ─► frequency_penalty, presence_penalty
```

transformers' own rules come behind them, but for the repetition penalty of a row that asks for any
of these: it stands where vLLM has it. Each step is one operation on all rows at once, over the
(row, token) pairs that it changes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.generation import read_rules
from pipeline.records import SamplingParams
from pipeline.request_rules import RequestRules, read_asked

_FIRST_ROOM = 32

Ints = NDArray[np.int64]


class TokenCounts:
    """How often each token has occurred in an answer that grows; kept beside a row, so that a step
    costs what is new."""

    def __init__(self) -> None:
        self._seen = 0
        self._place: dict[int, int] = {}
        self._ids = np.empty(_FIRST_ROOM, np.int64)
        self._counts = np.empty(_FIRST_ROOM, np.int64)
        self._prompt: Ints | None = None

    def of(self, output: Sequence[int]) -> tuple[Ints, Ints]:
        """Its distinct tokens and how often each occurs, which goes on from
        the last one."""
        for token in output[self._seen :]:
            place = self._place.get(token)
            if place is None:
                place = self._place[token] = len(self._place)
                if place == len(self._ids):
                    self._grow()
                self._ids[place], self._counts[place] = token, 0
            self._counts[place] += 1
        self._seen = len(output)
        distinct = len(self._place)
        return self._ids[:distinct], self._counts[:distinct]

    def _grow(self) -> None:
        self._ids, self._counts = (np.resize(x, 2 * len(x)) for x in (self._ids, self._counts))

    def with_prompt(self, prompt: Sequence[int] | NDArray[Any], output: Sequence[int]) -> Ints:
        """The distinct tokens of both."""
        ids, _ = self.of(output)
        if self._prompt is None:
            self._prompt = np.unique(np.asarray(prompt, np.int64))
        return np.union1d(self._prompt, ids)


class Context(NamedTuple):
    """The prompt of a row, and what it has answered so far; both token ids. `counts`: of that
    answer, where somebody keeps them."""

    prompt: Sequence[int] | NDArray[Any]
    output: Sequence[int]
    counts: TokenCounts | None = None


def asks(params: SamplingParams) -> bool:
    """Whether a row's logits go through any of these steps."""
    return bool(params.asked) and read_asked(params.asked).changes_logits


def adjust(
    scores: Tensor,
    params: Sequence[SamplingParams],
    contexts: Sequence[Context],
    eos: Collection[int],
) -> None:
    """Change `scores` [rows, V] float32 as the rows ask, in place."""
    rows = [(row, read_asked(p.asked)) for row, p in enumerate(params) if p.asked]
    contexts = [c if c.counts else c._replace(counts=TokenCounts()) for c in contexts]
    _allow(scores, params, rows)
    _forbid(scores, rows, contexts, eos)
    _bias(scores, params, rows)
    _repeat(scores, params, contexts)
    _count(scores, rows, contexts)


_Rows = list[tuple[int, RequestRules]]


def _allow(scores: Tensor, params: Sequence[SamplingParams], rows: _Rows) -> None:
    for row, rules in rows:
        if rules.allowed_token_ids:
            allowed = torch.from_numpy(_allowed(params[row].asked)).to(scores.device)
            kept = scores[row, allowed]
            scores[row] = -torch.inf
            scores[row, allowed] = kept


def _forbid(scores: Tensor, rows: _Rows, contexts: Sequence[Context], eos: Collection[int]) -> None:
    """Last tokens of bad words, and what would end an answer too early."""
    pairs: list[tuple[int, int]] = []
    for row, rules in rows:
        output = contexts[row].output
        if len(output) < rules.min_tokens:
            pairs += [(row, token) for token in (*eos, *rules.stop_token_ids)]
        pairs += [(row, token) for token in _completing(rules.bad_words_ids, output)]
    if pairs:
        at, tokens = np.array(pairs, np.int64).T
        scores[_index(scores, at), _index(scores, tokens)] = -torch.inf


def _completing(words: Sequence[tuple[int, ...]], output: Sequence[int]) -> list[int]:
    """The tokens that would complete one of these words."""
    found = []
    for word in words:
        before = len(word) - 1
        if before <= len(output) and tuple(output[len(output) - before :]) == word[:-1]:
            found.append(word[-1])
    return found


def _bias(scores: Tensor, params: Sequence[SamplingParams], rows: _Rows) -> None:
    parts = [(row, *_biases(params[row].asked)) for row, rules in rows if rules.logit_bias]
    if parts:
        at, tokens = _pairs([(row, ids) for row, ids, _ in parts], scores)
        values = np.concatenate([values for *_, values in parts])
        scores[at, tokens] += torch.from_numpy(values).to(scores.device)


def _repeat(scores: Tensor, params: Sequence[SamplingParams], contexts: Sequence[Context]) -> None:
    """Tokens of prompt and answer: positive logits are divided, negative ones multiplied."""
    parts, penalties = [], []
    for row, row_params in enumerate(params):
        penalty = _repetition_of(row_params) if asks(row_params) else None
        if penalty is not None:
            prompt, output, counts = contexts[row]
            assert counts is not None
            parts.append((row, counts.with_prompt(prompt, output)))
            penalties.append(np.full(len(parts[-1][1]), penalty, np.float32))
    if parts:
        at, tokens = _pairs(parts, scores)
        penalty_of = torch.from_numpy(np.concatenate(penalties)).to(scores.device)
        found = scores[at, tokens]
        scores[at, tokens] = torch.where(found > 0, found / penalty_of, found * penalty_of)


def _count(scores: Tensor, rows: _Rows, contexts: Sequence[Context]) -> None:
    """Tokens of the answer alone: `frequency` for each time, and `presence` once."""
    parts, taken = [], []
    for row, rules in rows:
        counts = contexts[row].counts
        if rules.counts_tokens and counts is not None and len(contexts[row].output):
            ids, times = counts.of(contexts[row].output)
            parts.append((row, ids))
            taken.append(times * rules.frequency_penalty + rules.presence_penalty)
    if parts:
        at, tokens = _pairs(parts, scores)
        values = np.concatenate(taken).astype(np.float32)
        scores[at, tokens] -= torch.from_numpy(values).to(scores.device)


def _pairs(parts: Sequence[tuple[int, Ints]], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of some tokens of each of some rows; no pair comes twice."""
    at = np.repeat([row for row, _ in parts], [len(ids) for _, ids in parts])
    return _index(scores, at), _index(scores, np.concatenate([ids for _, ids in parts]))


def _index(scores: Tensor, values: Ints) -> Tensor:
    return torch.from_numpy(values).to(scores.device)


@lru_cache(maxsize=256)
def _allowed(asked: str) -> Ints:
    return np.array(sorted(set(read_asked(asked).allowed_token_ids)), np.int64)


@lru_cache(maxsize=256)
def _biases(asked: str) -> tuple[Ints, NDArray[np.float32]]:
    bias = read_asked(asked).logit_bias
    return np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)


def _repetition_of(params: SamplingParams) -> float | None:
    penalty: float | None = read_rules(params.rules).get("repetition_penalty")
    return penalty


@lru_cache(maxsize=4096)
def without_repetition(params: SamplingParams) -> SamplingParams:
    """The same where the repetition penalty has been applied. The rules say that there is none,
    since `generate()` has to know that it must not follow the model's own."""
    rules: dict[str, Any] = json.loads(params.rules) if params.rules else {}
    if "repetition_penalty" not in rules:
        return params
    return replace(params, rules=json.dumps(rules | {"repetition_penalty": 1.0}, sort_keys=True))
