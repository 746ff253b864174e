"""What an engine asks of a grammar, and of the tags between which a model thinks. Knows no text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Matcher(Protocol):
    """How far an answer is in its grammar."""

    @property
    def is_over(self) -> bool:
        """Whether it is complete, and nothing may follow."""

    @property
    def may_end(self) -> bool:
        """Whether it is complete as it is."""

    def allows(self, token_id: int) -> bool:
        """Whether the token may follow, as its bit of a mask would say."""

    def accept(self, token_id: int) -> str | None:
        """The answer goes on with this token. Returns why it may not, or None."""

    def forced(self) -> list[int]:
        """The only tokens that may follow, one after the other."""

    def next_forced(self) -> int | None:
        """The first of them."""


class Tags(Protocol):
    """The tokens between which a model thinks."""

    @property
    def begin_ids(self) -> Sequence[int]: ...

    @property
    def end_ids(self) -> Sequence[int]: ...

    @property
    def blank_ids(self) -> Collection[int]:
        """Of white space, which may stand around them."""

    def is_open(self, prompt: Sequence[int] | NDArray[np.unsignedinteger]) -> bool:
        """Whether a prompt ends with the tag that begins, so that the answer is thought first."""
