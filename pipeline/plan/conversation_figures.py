"""What carrying conversations is worth, and what becomes of long ones, in numbers. Knows no text.

Answers are not known, so all of it is as if each were as long as it may be.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.conversations import ConversationPlan
from pipeline.plan.plan import Plan


@dataclass(frozen=True)
class ConversationFigures:
    """`most_turns`: of a conversation; `new_tokens`: what turns add, system messages included.

    `longest_tokens`: of a conversation at its end; `turns_beyond_window`, `turns_beyond_budget`:
    turns at whose end it is longer than the model's `window_tokens`, or than the `budget_tokens`
    that it keeps; `turns_beyond_length`: which come when it is as long as the model's `max_length`
    says already. Prompt tokens to compute: `carried_tokens` with KV carried from turn to turn,
    `resent_tokens` if each turn sent what was said before again. `state_tokens`: the most of a
    conversation at once, `state_bytes` of KV (None: no model); `at_once`: conversations within the
    KV budget (None: not said). `giving_way`: what becomes of one that must make room for others, in
    words (None: not measured here yet).
    """

    evictor: str
    conversations: int
    turns: int
    most_turns: int
    new_tokens: int
    answer_tokens: int
    longest_tokens: int
    window_tokens: int
    budget_tokens: int
    turns_beyond_window: int
    turns_beyond_budget: int
    turns_beyond_length: int
    carried_tokens: int
    resent_tokens: int
    state_tokens: int
    state_bytes: int | None
    at_once: int | None = None
    giving_way: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values, with a sentence for a person, or None."""
        return asdict(self) | {"text": self._text()}

    def _text(self) -> str | None:
        """What a person may have to decide."""
        beyond, window = self.turns_beyond_window, self.window_tokens
        if self.turns_beyond_length:
            return (
                f"as many as {self.turns_beyond_length:,} turns come after as many tokens as the "
                "max_length of the model's generation_config.json allows, and fail then; say how "
                "long an answer may be: --max-new-tokens"
            )
        if self.evictor == "none":
            said = (
                f"as many as {beyond:,} turns may exceed the model's context of {window:,} tokens, "
                "and are cut short or fail then; an evictor lets them go on: --evict"
            )
            return said if beyond else None
        if not self.turns_beyond_budget:
            return (
                f"no conversation can exceed {self.budget_tokens:,} tokens, so nothing is evicted: "
                "--evict none is as good, and exact"
            )
        if not beyond:
            return (
                f"no conversation can exceed the model's context of {window:,} tokens, so --evict "
                "none would answer all turns, exactly"
            )
        return None


NEVER_SAVED: Final = 2**31
"""A depth that no conversation comes to."""


def gives_way(saved_from: int) -> str:
    """What becomes of one that must make room for others: from this depth on it is saved."""
    if saved_from >= NEVER_SAVED:
        return "computed again, which takes less time than to save it"
    if saved_from <= 1:
        return "saved to memory of the host, which takes less time than to compute it again"
    return f"saved to memory of the host from {saved_from:,} tokens on, and computed again below"


def histories(plan: Plan, turns: ConversationPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(prompt tokens with all that was said before, tokens at its end) of each turn, at most."""
    new = np.array([p.max_new_tokens for p in plan.params], np.int64)[turns.params]
    own = plan.table.lengths[turns.row]
    upto = np.append(0, np.cumsum(own + new))
    before = np.repeat(upto[turns.bounds[:-1]], np.diff(turns.bounds))
    ends = upto[1:] - before
    limits = length_limits(plan, turns)
    return np.minimum(ends - new, limits), np.minimum(ends, limits)


def length_limits(plan: Plan, turns: ConversationPlan) -> NDArray[np.int64]:
    """[turns] tokens that each may have at its end where the model's `max_length` says so."""
    return replace(turns.eviction, window=0).limits(plan.params)[turns.params]


def count_conversations(
    plan: Plan, bytes_per_token: int | None, at_once: int | None = None
) -> ConversationFigures | None:
    """Of a plan's conversations; None: it has none."""
    turns = plan.conversations
    if turns is None:
        return None
    prompts, ends = histories(plan, turns)
    every, eviction = np.arange(len(plan.sequences)), turns.eviction
    state = int((plan.most_tokens + 1).max(initial=0))
    state = min(state, eviction.most_tokens)
    return ConversationFigures(
        evictor=eviction.evictor,
        conversations=len(plan.sequences),
        turns=len(turns.row),
        most_turns=int(np.diff(turns.bounds).max(initial=0)),
        new_tokens=int(plan.table.lengths[turns.row].sum()),
        answer_tokens=int(plan.answer_tokens.sum()),
        longest_tokens=int(ends.max(initial=0)),
        window_tokens=eviction.window,
        budget_tokens=eviction.most_tokens,
        turns_beyond_window=int((ends > eviction.window).sum()),
        turns_beyond_budget=int((ends > eviction.most_tokens).sum()),
        turns_beyond_length=int((prompts >= length_limits(plan, turns)).sum()),
        carried_tokens=plan.tokens_to_compute(every),
        resent_tokens=int(prompts.sum()),
        state_tokens=state,
        state_bytes=None if bytes_per_token is None else state * bytes_per_token,
        at_once=at_once,
    )
