"""Nested columns of the output, made of flat arrays: of a part with log-probabilities of twenty
tokens at each position, Python objects would take gigabytes. Knows no plan and no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.records import Completion
from pipeline.storage.schema import LOGPROBS, sample_type
from pipeline.tokens.reasoning import AnswerParts

Spell = Callable[[Sequence[int]], Sequence[str]]
"""The text of each token by itself."""


@dataclass(frozen=True)
class Shown:
    """A completion and what it says."""

    completion: Completion
    said: AnswerParts


def logprobs_column(completions: Sequence[Completion | None], spell: Spell) -> pa.Array:
    """A list for each; null where there is none, or it did not ask for them."""
    asked = [c is not None and bool(c.logprobs) for c in completions]
    positions = [
        (token_id, position)
        for c, has in zip(completions, asked, strict=True) if has and c is not None
        for token_id, position in zip(c.token_ids, c.logprobs, strict=True)
    ]  # fmt: skip
    ids = np.array([token_id for token_id, _ in positions], np.int32)
    top_ids = np.fromiter(chain.from_iterable(p.top_ids for _, p in positions), np.int32)
    top = np.fromiter(chain.from_iterable(p.top_logprobs for _, p in positions), np.float64)
    texts = _Texts(np.concatenate([ids, top_ids]), spell)
    own = np.array([position.logprob for _, position in positions], np.float64)
    tops = _lists([len(position.top_ids) for _, position in positions],
                  _token_structs(texts, top_ids, top))  # fmt: skip
    values = pa.StructArray.from_arrays(
        [texts.of(ids), pa.array(ids), pa.array(own), tops], fields=list(LOGPROBS.value_type)
    )
    lengths = [
        len(c.logprobs) if c is not None and has else None
        for c, has in zip(completions, asked, strict=True)
    ]
    return _lists(lengths, values).cast(LOGPROBS)


def samples_column(
    rows: Sequence[Sequence[Shown] | None],
    spell: Spell,
    with_logprobs: bool,
    with_reasoning: bool,
) -> pa.Array:
    """Of each row its samples; null where it has none."""
    shown = [sample for row in rows for sample in row or ()]
    ids = [sample.completion.token_ids for sample in shown]
    flat = np.fromiter(chain.from_iterable(ids), np.int32)
    arrays = [
        pa.array([sample.said.text for sample in shown], pa.string()),
        pa.array([sample.completion.finish_reason for sample in shown], pa.string()),
        _lists(list(map(len, ids)), pa.array(flat)),
    ]
    if with_logprobs:
        arrays.append(logprobs_column([sample.completion for sample in shown], spell))
    if with_reasoning:
        arrays.append(pa.array([sample.said.reasoning for sample in shown], pa.string()))
        arrays.append(pa.array([sample.said.reasoning_tokens for sample in shown], pa.int32()))
    kind = sample_type(with_logprobs, with_reasoning)
    values = pa.StructArray.from_arrays(arrays, fields=list(kind.value_type))
    return _lists([None if row is None else len(row) for row in rows], values).cast(kind)


class _Texts:
    """Of distinct tokens, each spelt once."""

    def __init__(self, token_ids: NDArray[np.int32], spell: Spell) -> None:
        self._known = np.unique(token_ids)
        self._texts = pa.array(spell(self._known.tolist()), pa.string())

    def of(self, token_ids: NDArray[np.int32]) -> pa.Array:
        """The text of each of these."""
        return self._texts.take(pa.array(np.searchsorted(self._known, token_ids)))


def _token_structs(
    texts: _Texts, token_ids: NDArray[np.int32], logprobs: NDArray[np.float64]
) -> pa.StructArray:
    arrays = [texts.of(token_ids), pa.array(token_ids), pa.array(logprobs)]
    return pa.StructArray.from_arrays(arrays, names=["token", "token_id", "logprob"])


def _lists(lengths: Sequence[int | None], values: pa.Array) -> pa.ListArray:
    """Lists of so many values, one after the other; None: null."""
    ends = np.cumsum([0, *(length or 0 for length in lengths)])
    is_null = np.array([*(length is None for length in lengths), False], bool)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32(), mask=is_null), values)
