"""From a batch of input rows to requests that fit the model: contexts and continuations.

What is too long gives up the beginning of its context, never of its continuation, where that is
asked for; a prompt that is scored itself is cut into windows, and each token is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pipeline.job.prepare import Limits
from pipeline.job.prepared_batch import PreparedBatch, PreparedRequests
from pipeline.job.row_faults import call_by_halves, sentence
from pipeline.prompts import AskedPrompt, Content, PromptBatch, Rejected, ScoredPrompt
from pipeline.records import SamplingParams
from pipeline.tokens.pairs import EncodedPairs, Pair, PairFault
from pipeline.tokens.tokenizer import PromptTokenizer

_MOST_TOKENS = 2**31 - 1  # of a row, in the output
_LETTERS_AT_A_TIME = 32_000_000


class ScorePreparation:
    """Tokenises batches of rows that are scored."""

    def __init__(self, tokenizer: PromptTokenizer, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits

    def parts(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """The same rows, so many at a time that their requests fit memory."""
        start = letters = 0
        for stop, content in enumerate(batch.contents):
            size = sum(map(_letters, _prompts(content)))
            if stop > start and letters + size > _LETTERS_AT_A_TIME:
                yield _slice(batch, start, stop)
                start, letters = stop, 0
            letters += size
        yield _slice(batch, start, len(batch.contents))

    def prepare(self, batch: PromptBatch) -> PreparedBatch:
        """Tokenise `batch` and fit each request to the context."""
        rejected = {bad.row_index: bad for bad in batch.rejected}
        context, limits = self._limits.context_length, self._limits
        most = context if limits.on_overlong == "error" else None
        found = self._encode(batch, rejected, most)
        cut = np.zeros(len(batch.contents), np.int64)
        rows: list[list[Pair]] = []
        for index, content in enumerate(batch.contents):
            row, pairs = batch.row_start + index, found.pairs.get(index, [])
            rows.append([])
            if row in rejected:
                continue
            if index in found.faults:
                fault = found.faults[index]
                rejected[row] = Rejected(row, fault.error_type, str(fault))
            elif index in found.overlong:
                rejected[row] = limits.overlong(row, f"at least {found.overlong[index]}")
            elif isinstance(content, ScoredPrompt) and not content.continuations:
                rows[-1] = [window for pair in pairs for window in windows(pair, context)]
            else:
                fitted = self._fit(row, pairs)
                if isinstance(fitted, Rejected):
                    rejected[row] = fitted
                else:
                    rows[-1], cut[index] = fitted
            total = sum(len(p.context) + len(p.continuation) for p in rows[-1])
            if total > _MOST_TOKENS:
                rejected[row] = Rejected(
                    row,
                    "TooManyTokens",
                    f"the requests of the row have {total} tokens together, and one row may have "
                    f"{_MOST_TOKENS}; give it fewer choices",
                )
                rows[-1] = []
        return _prepared(rows, cut, rejected)

    def _encode(
        self, batch: PromptBatch, rejected: dict[int, Rejected], most: int | None
    ) -> EncodedPairs:
        """The requests of all rows; one that a library fails on is told from the others."""
        found, encode = EncodedPairs(), self._tokenizer.encode_pairs
        asked = [
            (index, prompt, question)
            for index, content in enumerate(batch.contents)
            if batch.row_start + index not in rejected
            for prompt, question in zip(_prompts(content), _questions(content), strict=True)
        ]
        prompts = [prompt for _, prompt, _ in asked]
        for start, encoded in call_by_halves(lambda some: encode(some, most), prompts):
            if isinstance(encoded, BaseException):
                reason = sentence("the prompt or a choice cannot be tokenised", encoded)
                encoded = EncodedPairs(faults={0: PairFault(reason)})
            for place, pairs in encoded.pairs.items():
                found.pairs.setdefault(asked[start + place][0], []).extend(pairs)
            for place, fault in encoded.faults.items():
                index, _, question = asked[start + place]
                found.faults.setdefault(index, fault.about(question))
            for place, least in encoded.overlong.items():
                found.overlong.setdefault(asked[start + place][0], least)
        return found

    def _fit(self, row: int, pairs: Sequence[Pair]) -> tuple[list[Pair], int] | Rejected:
        """The requests of a row, and how many tokens were cut from their contexts."""
        context, on_overlong = self._limits.context_length, self._limits.on_overlong
        fitted, cut = [], 0
        for pair in pairs:
            length = len(pair.context) + len(pair.continuation) - 1
            if context is None or length <= context or on_overlong == "keep":
                fitted.append(pair)
                continue
            if on_overlong == "error":
                return self._limits.overlong(row, str(length))
            kept = context - len(pair.continuation) + 1
            if kept < 1:
                message = (
                    f"a continuation has {len(pair.continuation)} tokens, which leave no room for "
                    f"a context in the model's {context}; shorten it"
                )
                return Rejected(row, "OverlongContinuation", message)
            cut += len(pair.context) - kept
            has_start = kept > 1 and pair.context[0] == self._tokenizer.bos_id
            ids = pair.context[len(pair.context) - kept + has_start :]
            start = pair.context[:has_start]
            fitted.append(pair._replace(context=np.concatenate([start, ids])))
        return fitted, cut


def windows(pair: Pair, context_length: int | None) -> list[Pair]:
    """Requests that score each token of the continuation once, as `loglikelihood_rolling` does:
    the first window from the context on, each further one behind as many tokens as it has room for,
    one at least."""
    ids = np.concatenate([pair.context[-1:], pair.continuation])
    most = len(ids) if context_length is None else context_length
    if len(pair.continuation) <= most:
        return [pair]
    found, low = [], 1  # tokens of `ids` that are scored, the one before all of them
    while low < len(ids):
        high = min(low + most, len(ids))
        first = max(0, high - 1 - most)
        found.append(Pair(ids[first:low], ids[low:high], pair.num_bytes if low == 1 else 0))
        low = high
    return found


def _prepared(
    rows: Sequence[Sequence[Pair]], cut: np.ndarray, rejected: dict[int, Rejected]
) -> PreparedBatch:
    nothing = Pair(np.zeros(0, np.uint32), np.zeros(1, np.uint32), 0)
    pairs = [pair for some in rows for pair in some or [nothing]]
    requests = PreparedRequests(
        counts=np.array([max(1, len(some)) for some in rows], np.int64),
        contexts=np.array([len(pair.context) for pair in pairs], np.int64),
        last=np.array([pair.continuation[-1] for pair in pairs], np.int64),
        num_bytes=np.array([pair.num_bytes for pair in pairs], np.int64),
        cut=cut,
        pieces=[part for pair in pairs for part in (pair.context, pair.continuation[:-1])],
    )
    lengths = np.array([len(p.context) + len(p.continuation) - 1 for p in pairs], np.int64)
    params = [SCORED] * len(rows)
    return PreparedBatch(np.zeros(0, np.uint32), lengths, params, rejected, {}, {}, requests)


SCORED = SamplingParams(max_new_tokens=1)
"""Nothing is generated, so no row has parameters of its own."""


def _prompts(content: Content | None) -> list[ScoredPrompt]:
    """What is asked of a row, in order."""
    if isinstance(content, AskedPrompt):
        return content.prompts
    return [content] if isinstance(content, ScoredPrompt) else []


def _questions(content: Content | None) -> list[str]:
    """By prompt of a row the question that it asks; no name where there are no questions."""
    if isinstance(content, AskedPrompt):
        return [question.name for question in content.sheet.questions]
    return [""] * len(_prompts(content))


def _letters(prompt: ScoredPrompt) -> int:
    context = prompt.context
    size = len(context) if isinstance(context, str) else sum(len(m["content"]) for m in context)
    return sum(size + len(text) for text in prompt.continuations) or size


def _slice(batch: PromptBatch, start: int, stop: int) -> PromptBatch:
    first, last = batch.row_start + start, batch.row_start + stop
    return replace(
        batch,
        row_start=first,
        ids=batch.ids[start:stop],
        contents=batch.contents[start:stop],
        overrides=batch.overrides[start:stop],
        tenants=batch.tenants[start:stop],
        rejected=tuple(bad for bad in batch.rejected if first <= bad.row_index < last),
    )
