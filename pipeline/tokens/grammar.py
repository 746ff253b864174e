"""Constraints as masks over token ids, by llguidance. Knows no prompts and no rows.

```
 constraint ─► compiled once, copied for each answer ─► mask ─► token ─► mask ─► ...
                                                    └─► forced tokens, as the tokenizer writes them
```

JSON is compact: where white space is free, nothing is forced. What is forced is asked once and kept
until it is said, so that it is the same tokens whether they are decoded one by one or fed together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.constraints import Constraint
from pipeline.narrowed_schemas import narrowed
from pipeline.tokens.reasoning import ReasoningTags

_MOST_COMPILED: Final = 256
_MOST_LEXER_STATES: Final = 20_000  # 1 to 2 KiB each
_MOST_OPENING: Final = 4096


class Grammars:
    """What constraints mean to one tokenizer. Can be sent to another process."""

    def __init__(
        self,
        tokenizer: str,
        vocabulary_size: int,
        eos_id: int | None,
        tags: ReasoningTags | None = None,
    ) -> None:
        """`tokenizer`: the content of its tokenizer.json."""
        self._source = tokenizer
        self._size = vocabulary_size
        self._eos_id = eos_id
        self._tags = tags
        self._compiled = lru_cache(_MOST_COMPILED)(self._compile)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._source, self._size, self._eos_id, self._tags

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def vocabulary_size(self) -> int:
        return self._size

    @property
    def tags(self) -> ReasoningTags | None:
        return self._tags

    def matcher(self, constraint: str) -> TokenMatcher:
        """At the beginning of an answer. Raises ValueError where it cannot be compiled."""
        return TokenMatcher(self._compiled(constraint).deep_copy(), self._tokenizer.vocab_size)

    def fill(self, matchers: Sequence[TokenMatcher]) -> NDArray[np.int32]:
        """[matchers, words] which tokens may follow: a bit each, the first id lowest."""
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        masks = np.zeros((len(matchers), -(-self._tokenizer.vocab_size // 32)), np.int32)
        free = []
        for row, matcher in enumerate(matchers):
            forced = matcher.next_forced()
            if forced is not None:
                masks.view(np.uint32)[row, forced // 32] = 1 << forced % 32
            elif not matcher.own.is_stopped():
                free.append((matcher.own, row))
        if len(free) == 1:
            fill_next_token_bitmask(free[0][0], masks, free[0][1])
        elif free:
            fill_next_token_bitmask_par(self._executor, free, masks)
        return masks

    def opening(self, constraint: str) -> tuple[int, ...]:
        """What every answer begins with, but for a last token where that is all of it. Raises
        ValueError where the constraint cannot be compiled, or has no answer that is not empty."""
        matcher = self.matcher(constraint)
        said: list[int] = []
        while len(said) < _MOST_OPENING and (token_id := matcher.next_forced()) is not None:
            if matcher.accept(token_id) is not None:
                raise ValueError(_reason(matcher.own.get_error()))
            said.append(token_id)
        if said and matcher.is_over:
            said.pop()
        elif len(said) < _MOST_OPENING:
            self._check_next(matcher, is_first=not said)
        return tuple(said)

    def _check_next(self, matcher: TokenMatcher, is_first: bool) -> None:
        """Raises ValueError where no token may follow."""
        mask = self.fill([matcher])
        if self._eos_id is not None:
            mask.view(np.uint32)[0, self._eos_id // 32] &= 0xFFFFFFFF ^ (1 << self._eos_id % 32)
        if mask.any() or matcher.may_end and not is_first:
            return
        what = "nothing but an empty answer fits it" if matcher.may_end else "no answer fits it"
        raise ValueError(_reason(matcher.own.get_error()) if matcher.own.is_error() else what)

    def _compile(self, constraint: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
        text = _grammar_text(json.loads(constraint))
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(_reason(matcher.get_error()))
        return matcher

    def load(self) -> None:
        """Read the tokenizer now."""
        assert self._tokenizer is not None

    @cached_property
    def _executor(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(len(os.sched_getaffinity(0)))  # its own choice leaves one of two idle

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        try:
            return LLTokenizer(self._source, n_vocab=self._size, eos_token=self._eos_id)
        except Exception:  # of a kind that llguidance cannot read: token by token
            return LLTokenizer(
                TokenizerWrapper(_Vocabulary(self._source, self._size, self._eos_id))
            )


class TokenMatcher:
    """How far an answer is in its grammar."""

    def __init__(self, own: Any, vocabulary_size: int) -> None:
        self.own = own
        self._size = vocabulary_size
        self._forced: list[int] = []
        self._said = 0  # of them
        self._next: int | None = None
        self._is_known = False  # whether this is what is forced now

    @property
    def is_over(self) -> bool:
        return bool(self.own.is_stopped()) and not self.own.is_error()

    @property
    def may_end(self) -> bool:
        return self.next_forced() is None and bool(self.own.is_accepting())

    def allows(self, token_id: int) -> bool:
        """Whether the token may follow, as its bit of a mask would say."""
        expected = self.next_forced()
        if expected is not None:
            return token_id == expected
        if token_id >= self._size or self.own.is_stopped():
            return False  # it would be an error of the matcher to be asked for such an id
        return bool(self.own.validate_tokens([token_id]))

    def accept(self, token_id: int) -> str | None:
        """The answer goes on with this token. Returns why it may not, or None."""
        expected = self.next_forced()
        if expected is not None and expected != token_id:
            return "a token does not fit what the answer must be"
        self._said += 1
        self._is_known = self._said < len(self._forced)
        if self._is_known:
            self._next = self._forced[self._said]
        if self.own.consume_token(token_id):
            return None
        return "a token does not fit what the answer must be, or that is too complex"

    def forced(self) -> list[int]:
        """The only tokens that may follow, one after the other."""
        return [] if self.next_forced() is None else self._forced[self._said :]

    def next_forced(self) -> int | None:
        """The first of them."""
        if not self._is_known:
            self._is_known, self._said = True, 0
            self._forced = [] if self.own.is_stopped() else list(self.own.compute_ff_tokens())
            self._next = self._forced[0] if self._forced else None
        return self._next


class _Vocabulary:
    """A tokenizer of a kind that llguidance cannot read, by the text of each token."""

    def __init__(self, source: str, size: int, eos_id: int | None) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(source)
        special = {n for n, t in self._backend.get_added_tokens_decoder().items() if t.special}
        self.tokens = [
            f"<{i}>".encode() if i in special else self._text(i).encode() for i in range(size)
        ]
        self.special_token_ids = sorted(special)
        self.eos_token_id = eos_id
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        said = text.decode(errors="replace") if isinstance(text, bytes) else text
        ids: list[int] = self._backend.encode(said, add_special_tokens=False).ids
        return ids

    def _text(self, token_id: int) -> str:
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text


def _grammar_text(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    ((kind, value),) = constraint.items()
    if kind == "json_schema":
        text: str = LLMatcher.grammar_from_json_schema(
            narrowed(value), overrides={"whitespace_flexible": False}
        )
        return text
    make = LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark
    return str(make(value))


def _reason(text: str) -> str:
    """Of what llguidance says, the line that tells what is wrong: of an expression the one that
    begins with "error: ", for the first one ends where its text begins."""
    lines = text.splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = next(iter([*said, *lines]), "")
    return re.sub(r"\s+", " ", line)[:300] or "it cannot be compiled"
