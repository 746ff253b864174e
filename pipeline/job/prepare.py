"""From a batch of input rows to token ids and parameters that fit the model. Knows no files.

What cannot run is noted with a reason and gets no tokens; nothing else of a row is changed, except
that an answer never gets more room than the model's context leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.generation import end_at, resolve_sampling, why_not_by_vllm
from pipeline.job.prepare_forms import Forms
from pipeline.job.prepared_batch import PreparedBatch
from pipeline.job.request_limits import RequestLimits
from pipeline.job.row_faults import call_by_halves, sentence
from pipeline.prompts import PromptBatch, Rejected
from pipeline.records import SamplingParams
from pipeline.sampling_settings import SamplingSettings
from pipeline.tokens.constraint_check import ConstraintChecker
from pipeline.tokens.tokenizer import PromptTokenizer


class _Encoded(NamedTuple):
    """See `PreparedBatch`."""

    flat: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    segments: dict[int, list[int]]
    system_tokens: dict[int, int]


@dataclass(frozen=True)
class Limits:
    """The model's context in tokens (None: unknown) and what to do with prompts beyond it.

    `engine`: rows that ask it for what it cannot do are refused. `most_documents` of a row (None:
    any number), each of which adds `soft_tokens` to its prompt. `in_segments`: prompts that are cut
    into segments, which are never shortened. `in_turns`: rows are turns of conversations.
    `requests`: what rows may ask for besides.
    """

    context_length: int | None
    on_overlong: str
    engine: str = "prefix"
    most_documents: int | None = None
    soft_tokens: int = 0
    in_segments: bool = False
    in_turns: bool = False
    requests: RequestLimits = RequestLimits()

    def overlong(self, row: int, length: str) -> Rejected:
        """A row whose prompt has `length` tokens, which are too many."""
        if self.in_turns:
            message = (
                f"the turn has {length} tokens, the model's context {self.context_length}; cut it "
                "into several turns"
            )
            return Rejected(row, "TurnTooLong", message)
        said = f"the prompt has {length} tokens, the model's context {self.context_length}"
        advice = "" if self.in_segments else ", or choose --on-overlong truncate-left"
        return Rejected(row, "OverlongPrompt", f"{said}; shorten it{advice}")


class Preparing(Protocol):
    """How rows become what the plan is made of."""

    def parts(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """The same rows, so many at a time as are prepared together."""

    def prepare(self, batch: PromptBatch) -> PreparedBatch:
        """Tokenise `batch` and fit it to the model."""


class Preparation:
    """Tokenises batches under one set of rules."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        sampling: SamplingSettings,
        generation_config: dict[str, Any],
        limits: Limits,
        checker: ConstraintChecker | None = None,
    ) -> None:
        """`checker`: of this tokenizer, where there is one already."""
        self._tokenizer = tokenizer
        self._forms = Forms(tokenizer, checker or ConstraintChecker(lambda: tokenizer.grammars))
        self._sampling = sampling
        self._generation_config = generation_config
        self._limits = limits
        self._resolved: dict[str, SamplingParams] = {}

    def parts(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """The same rows, so many at a time as are prepared together."""
        yield batch

    def prepare(self, batch: PromptBatch) -> PreparedBatch:
        """Tokenise `batch`, resolve each row's parameters, and fit both to the context."""
        rejected = {bad.row_index: bad for bad in batch.rejected}
        params = []
        for row, override in enumerate(batch.overrides, batch.row_start):
            resolved = self._resolve(row, override)
            if isinstance(resolved, Rejected):
                rejected.setdefault(row, resolved)
                resolved = SamplingParams()
            params.append(resolved)
        openings = self._forms.check(batch, params, rejected)
        flat, lengths, segments, system_tokens = self._encode(batch, rejected)
        added = np.zeros(len(lengths), np.int64)
        for index, parts in segments.items():
            added[index] = (len(parts) - 2) * self._limits.soft_tokens
        changed = {
            index: (max(0, kept - int(added[index])), chosen)
            for index, (kept, chosen) in self._fit(
                batch.row_start, lengths + added, params, rejected
            ).items()
        } | self._refuse_documents(batch.row_start, segments, params, rejected)
        starts = np.cumsum(lengths) - lengths
        keep = np.ones(len(flat), bool)
        for index, (kept, chosen) in changed.items():
            # The end of a prompt is what its answer follows from, so the beginning goes: all but
            # the token that every text of the model begins with.
            start, cut = int(starts[index]), int(lengths[index]) - kept
            has_bos = kept > 1 and flat[start] == self._tokenizer.bos_id
            keep[start + has_bos : start + has_bos + cut] = False
            lengths[index], params[index] = kept, chosen
            if not kept:
                segments.pop(index, None)
        flat = flat[keep]
        if openings and self._limits.engine == "prefix" and not self._limits.in_turns:
            flat, lengths = self._forms.open((flat, lengths), params, openings, segments)
        return PreparedBatch(flat, lengths, params, rejected, segments, system_tokens)

    def _resolve(self, row: int, override: dict[str, object]) -> SamplingParams | Rejected:
        key = json.dumps(override, sort_keys=True, default=repr) if override else ""
        if key not in self._resolved:
            try:
                params = resolve_sampling(self._sampling, self._generation_config, override)
                self._resolved[key] = self._limits.requests.apply(
                    params, self._tokenizer.encode_word
                )
            except ValueError as error:  # ours, and quotes no text of the row
                return Rejected(row, "BadSamplingParams", str(error))
            except Exception as error:
                reason = sentence("the sampling parameters cannot be used", error)
                return Rejected(row, "BadSamplingParams", reason)
        params = self._resolved[key]
        why = why_not_by_vllm(params) if self._limits.engine == "vllm" else None
        if params.is_guided and self._limits.engine == "echo":
            why = "the echo engine holds no answer to a form; choose --engine prefix"
        return params if why is None else Rejected(row, "BadSamplingParams", why)

    def _encode(self, batch: PromptBatch, rejected: dict[int, Rejected]) -> _Encoded:
        """Rejected rows have length 0."""
        contents = [
            None if row in rejected else content
            for row, content in enumerate(batch.contents, batch.row_start)
        ]
        limits = self._limits
        most = limits.context_length if limits.on_overlong == "error" else None
        flat, lengths = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
        segments: dict[int, list[int]] = {}
        system_tokens: dict[int, int] = {}
        encode = self._tokenizer.encode_batch
        for start, encoded in call_by_halves(lambda some: encode(some, most), contents):
            first = batch.row_start + start
            if isinstance(encoded, BaseException):
                reason = sentence("the prompt cannot be tokenised", encoded)
                rejected[first] = Rejected(first, "BadPrompt", reason)
                lengths.append(np.zeros(1, np.int64))
                continue
            for index, least in encoded.overlong.items():
                row = first + index
                rejected[row] = limits.overlong(row, f"at least {least}")
            for index, reason in encoded.errors.items():
                error_type = encoded.error_types.get(index, "BadPrompt")
                rejected[first + index] = Rejected(first + index, error_type, reason)
            segments |= {start + index: parts for index, parts in encoded.segments.items()}
            system_tokens |= {start + i: count for i, count in encoded.system_tokens.items()}
            flat.append(encoded.flat)
            lengths.append(encoded.lengths)
        return _Encoded(np.concatenate(flat), np.concatenate(lengths), segments, system_tokens)

    def _refuse_documents(
        self,
        row_start: int,
        segments: dict[int, list[int]],
        params: list[SamplingParams],
        rejected: dict[int, Rejected],
    ) -> dict[int, tuple[int, SamplingParams]]:
        """By index, rows with more documents than can be told apart; see `_fit`."""
        most, changed = self._limits.most_documents, {}
        for index, parts in segments.items():
            documents = len(parts) - 2
            if most is not None and documents > most:
                row = row_start + index
                rejected[row] = Rejected(
                    row,
                    "TooManyDocuments",
                    f"the row has {documents} documents, and link tokens are there for {most}; "
                    "give it fewer, or choose another --reuse",
                )
                changed[index] = (0, params[index])
        return changed

    def _fit(
        self,
        row_start: int,
        lengths: NDArray[np.int64],
        params: list[SamplingParams],
        rejected: dict[int, Rejected],
    ) -> dict[int, tuple[int, SamplingParams]]:
        """By index, what changes where nothing is left for an answer or the context is exceeded.

        Where the model limits prompt and answer together, `params` get what is left.
        """
        changed, in_turns = {}, self._limits.in_turns
        for index, chosen in enumerate(params):
            ended = end_at(chosen, int(lengths[index]), in_turns) if chosen.rules else chosen
            if ended is not None:
                params[index] = ended
                continue
            changed[index] = (0, chosen)
            message = (
                f"the prompt has {lengths[index]} tokens, and the max_length of the model's "
                f"generation_config.json allows {chosen.max_new_tokens} for prompt and answer; "
                "choose --max-new-tokens"
            )
            rejected[row_start + index] = Rejected(row_start + index, "OverlongPrompt", message)
        context = self._limits.context_length
        if context is None:
            return changed
        most = np.array([min(p.max_new_tokens, context) for p in params], np.int64)
        for index in np.flatnonzero((lengths > 0) & (lengths + most > context)).tolist():
            length, chosen = int(lengths[index]), params[index]
            fitted = fit_to_context(length, chosen, context, self._limits.on_overlong)
            if fitted is None:
                rejected[row_start + index] = self._limits.overlong(row_start + index, str(length))
            changed.setdefault(index, fitted or (0, chosen))
        return changed


def fit_to_context(
    length: int, params: SamplingParams, context: int, on_overlong: str
) -> tuple[int, SamplingParams] | None:
    """(prompt tokens kept, parameters) of a row whose prompt and answer exceed `context` tokens.

    None: refused. A prompt that fits by itself is never touched; its answer gets what is left.
    """
    if length >= context:
        if on_overlong == "error":
            return None
        if on_overlong == "keep":
            return length, params
        length = max(1, context - params.max_new_tokens)
    return length, replace(params, max_new_tokens=min(params.max_new_tokens, context - length))
