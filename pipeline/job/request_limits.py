"""What a row may ask for in this job, and its bad words as token ids. Knows no files.

Only rows that ask for something come here; what they share is looked at once, for parameters are
resolved once for all rows that say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.inputs.columns import ColumnMap
from pipeline.records import SamplingParams
from pipeline.request_rules import read_asked, with_bad_words
from pipeline.settings import JobSettings

if TYPE_CHECKING:
    from pipeline.model.shape import ModelShape

EncodeWord = Callable[[str], Sequence[int]]
"""The token ids of a text, without those that begin or end every text."""


@dataclass(frozen=True)
class RequestLimits:
    """`vocabulary_size` of the model, None: unknown; `single`: why a row can have one sample only,
    as the end of a sentence; `no_logprobs`: why nobody gives any."""

    vocabulary_size: int | None = None
    single: str = ""
    no_logprobs: str = ""

    @classmethod
    def of(
        cls, settings: JobSettings, shape: ModelShape | None, columns: ColumnMap | None = None
    ) -> RequestLimits:
        """Those of a job; `columns` None: as far as the settings say."""
        single = ""
        if columns is not None and columns.conversation is not None:
            single = "the next turn of a conversation follows one answer"
        elif settings.reuse.moves_documents:
            single = f"--reuse {settings.reuse.reuse} computes a row with documents once"
        no_logprobs = "the echo engine has none" if settings.model.engine == "echo" else ""
        return cls(None if shape is None else shape.vocabulary_size, single, no_logprobs)

    def apply(self, params: SamplingParams, encode: EncodeWord) -> SamplingParams:
        """The same parameters with all ids that they need. Raises ValueError that names a field."""
        if params.n > 1 and self.single:
            raise ValueError(f"n is {params.n}, but {self.single}; leave it out")
        if params.logprobs is not None and self.no_logprobs:
            raise ValueError(f"logprobs is {params.logprobs}, but {self.no_logprobs}")
        if not params.asked:
            return params
        rules = read_asked(params.asked)
        for name, largest in rules.token_ids().items():
            if self.vocabulary_size is not None and largest >= self.vocabulary_size:
                raise ValueError(
                    f"{name} names the token id {largest}, but the model knows "
                    f"{self.vocabulary_size} ids"
                )
        if not rules.bad_words:
            return params
        ids = spell_bad_words(rules.bad_words, encode)
        return replace(params, asked=with_bad_words(params.asked, ids))


def spell_bad_words(words: Sequence[str], encode: EncodeWord) -> tuple[tuple[int, ...], ...]:
    """As vLLM does: each word as it begins a text and, where a space before it gives as many tokens
    of which the first is another one, as it stands within a text. Raises ValueError."""
    found: list[tuple[int, ...]] = []
    for word in dict.fromkeys(words):
        first = tuple(encode(word.lstrip()))
        if not first:
            raise ValueError("bad_words: one of the words has no token of its own")
        found.append(first)
        within = tuple(encode(f" {word.lstrip()}"))
        if len(within) == len(first) and within[0] != first[0]:
            found.append(within)
    return tuple(found)
