"""Texts of requests become token ids as the harness's `hf` model has it, many at a time.

Knows one tokenizer; knows no requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.models.utils import has_bos_prefix

from kvcoppice.evaluation.evaluator import Tokens
from kvcoppice.evaluation.shared_texts import DifferentTokens, encode_shared
from pipeline.errors import UsageError
from pipeline.tokens.text_encoder import TextEncoder
from pipeline.tokens.words import makes_tokens_of_words

_NO_TOKENS = np.zeros(0, np.uint32)
_LETTERS_AT_A_TIME = 4_000_000


class Texts:
    """`add_bos_token`: whether special tokens are put around a text; None: as the tokenizer says.
    `prefix_token_id`: what stands before a text that has no context; None: BOS, else EOS."""

    def __init__(
        self, tokenizer: Any, add_bos_token: bool | None, prefix_token_id: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._around = tuple(np.array(ids, np.uint32) for ids in TextEncoder(self._backend).around)
        self._cuts = makes_tokens_of_words(self._backend)
        self._adds = True if add_bos_token is None else add_bos_token
        self.prefix_token_id = prefix_token_id
        for known in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if self.prefix_token_id is None:
                self.prefix_token_id = known
        self._prefix_text = None
        if self.prefix_token_id is not None:
            self._prefix_text = tokenizer.decode(self.prefix_token_id)
        if add_bos_token and tokenizer.bos_token_id not in self._encode(["a"], True)[0]:
            raise UsageError(
                "add_bos_token: this tokenizer puts no BOS before a text; leave it out, or say so "
                "in its tokenizer.json"
            )

    @property
    def prefix(self) -> Tokens:
        """What stands before a text that has no context. Raises UsageError if there is nothing."""
        if self.prefix_token_id is None:
            raise UsageError(
                "a request has no context, and the model has neither BOS nor EOS to stand for it; "
                "say prefix_token_id"
            )
        return np.array([self.prefix_token_id], np.uint32)

    def encode(self, texts: Iterable[str], add: bool | None = None) -> dict[str, Tokens]:
        """The ids of each. `add` special tokens; None: unless the text begins with what stands for
        a missing context."""
        return self._encode_apart(texts, self._prefix_text, add)

    def encode_prompts(self, texts: Iterable[str]) -> dict[str, Tokens]:
        """The ids of each, which something is to follow: with special tokens unless it begins with
        BOS."""
        return self._encode_apart(texts, self._tokenizer.bos_token, None)

    def _encode_apart(
        self, texts: Iterable[str], beginning: str | None, add: bool | None
    ) -> dict[str, Tokens]:
        found: dict[str, Tokens] = {}
        has_begun: dict[bool, list[str]] = {True: [], False: []}
        for text in dict.fromkeys(texts):
            has_begun[has_bos_prefix(text, beginning)].append(text)
        for begun, some in has_begun.items():
            adds = add if add is not None else self._adds and not begun
            found |= self._encode_shared(some, adds)
        return found

    def _encode_shared(self, texts: list[str], adds: bool) -> dict[str, Tokens]:
        if self._cuts and len(texts) > 1:
            before, after = self._around if adds else (_NO_TOKENS, _NO_TOKENS)
            try:
                bare = encode_shared(texts, lambda some: self._encode(some, False))
                if not len(before) and not len(after):
                    return bare
                return {text: np.concatenate([before, ids, after]) for text, ids in bare.items()}
            except DifferentTokens:
                self._cuts = False
        return dict(zip(texts, self._encode(texts, adds), strict=True))

    def _encode(self, texts: list[str], adds: bool) -> list[Tokens]:
        return [
            np.array(encoding.ids, np.uint32)
            for portion in portions(texts)
            for encoding in self._backend.encode_batch_fast(portion, add_special_tokens=adds)
        ]


def portions(texts: Sequence[Any]) -> Iterator[Any]:
    """Of texts, or of tuples that begin with texts, in order: a few million letters at a time."""
    start = letters = 0
    for stop, text in enumerate(texts):
        size = len(text) if isinstance(text, str) else sum(len(t) for t in text if type(t) is str)
        if letters + size > _LETTERS_AT_A_TIME and stop > start:
            yield texts[start:stop]
            start, letters = stop, 0
        letters += size
    yield texts[start:]
