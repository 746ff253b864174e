"""How far the thinking of an answer is, on ids alone.

```
 (open: the prompt has begun it)  ─► said, at most the budget ─► end tag ─► past
 (may begin) ─► begin tag ─► ...        or ─► any other token ─► past
```
"""

from __future__ import annotations

from pipeline.engine.base import TokenIds
from pipeline.engine.grammars import Tags
from pipeline.records import SamplingParams


class Thinking:
    """Of one answer. `forced`: what of a tag must follow; `may_begin`: the next token may open it;
    `is_past`: what follows is the answer, and this has nothing more to say."""

    def __init__(self, tags: Tags, params: SamplingParams, prompt: TokenIds) -> None:
        """`prompt`: with the opening, if there is one."""
        self.begin: tuple[int, ...] = tuple(tags.begin_ids)
        self._end: tuple[int, ...] = tuple(tags.end_ids)
        self._budget = params.thinking_budget
        self.forced: list[int] = []
        self._said: list[int] = []
        self._blanks = frozenset(tags.blank_ids)
        self._has_form = bool(params.constraint)
        self.is_open = tags.is_open(prompt)
        asks = self._budget is not None and not self.is_open and not params.opening
        self.may_begin = bool(self.begin) and asks
        self._watch_budget()

    @property
    def is_past(self) -> bool:
        return not (self.is_open or self.forced or self.may_begin)

    def takes(self, token_id: int) -> bool:
        """Whether the token is one of thinking or of a tag, and none of the answer."""
        if self.may_begin:
            if token_id in self._blanks and not self._has_form:
                return False  # they may stand before the tag, but not before a form
            self.may_begin = False
            if token_id != self.begin[0]:
                return False
            self.forced = list(self.begin[1:])
            self.is_open = not self.forced
            self._watch_budget()
            return True
        if self.forced:
            self.forced = self.forced[1:]
            if not self.forced and not self.is_open:
                self.is_open = True  # the tag that begins it is complete
                self._watch_budget()
            elif not self.forced:
                self.is_open = False
            return True
        if not self.is_open:
            return False
        self._said.append(token_id)
        if tuple(self._said[-len(self._end) :]) == self._end:
            self.is_open = False
        else:
            self._watch_budget()
        return True

    def _watch_budget(self) -> None:
        """Where it is used up, force what of the end tag has not been said."""
        if not self.is_open or self._budget is None or len(self._said) < self._budget:
            return
        said = next(n for n in range(len(self._end) - 1, -1, -1) if self._ends_with(n))
        self.forced = list(self._end[said:])

    def _ends_with(self, count: int) -> bool:
        return not count or tuple(self._said[-count:]) == self._end[:count]
