"""Conversations: turns whose prompts hold answers that nobody knows yet. Knows no text, no device.

```
 table row      a: 0                b: 0            a: 1              a: 2
 holds          whole first prompt  ...             ids that it adds  ids that it adds
 sequence       one for each conversation; the tree is that of the first prompts alone
 computed       U(first prompts) + for each later turn: the last token of the answer before (its KV
                is in no forward yet) and what it adds
```

What a turn adds is what the template writes between the end of the last answer and the beginning of
its own: it is known before the run, the answers are not. A template often begins it with the token
that ended the answer; then that token is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.generation import end_at, length_limit
from pipeline.plan.token_table import Ids
from pipeline.records import SamplingParams

Evictor = Literal[
    "none", "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o",
    "snapkv", "random",
]  # fmt: skip
BY_WEIGHTS: tuple[Evictor, ...] = ("attention-top", "h2o", "snapkv")
"""Those that ask how much attention a token got."""
BY_HEAD: tuple[Evictor, ...] = ("h2o", "snapkv")
"""Those that keep other tokens in each layer and head."""
CONTEXT_EXCEEDED: Final = "ContextExceeded"
"""The error of a turn before which so much was said that nothing is left for its answer."""
_NO_LIMIT: Final = 2**62


@dataclass(frozen=True)
class Eviction:
    """What becomes of a history that does not fit. Tokens all; see docs/stateful.md.

    A conversation keeps at most `budget_tokens` (N); what the model can see is `window` (W, at
    least N). More is evicted down to `evict_to` x N at once. `sink_tokens` and `gist_tokens`: the
    first of a conversation that are kept; its system prompt always is, but by "window". `unit`:
    single tokens or whole turns. `positions`: where kept tokens stand. "gap": where they were;
    "rerotate": side by side; "auto": the first while the span is at most 0.9 W, then the other.
    `on_full`: "error" makes a turn that needs eviction an error. `seed`: of "random".
    """

    evictor: Evictor = "none"
    budget_tokens: int = 0
    window: int = 0
    evict_to: float = 0.75
    sink_tokens: int = 4
    gist_tokens: int = 512
    unit: Literal["token", "turn"] = "token"
    positions: Literal["auto", "gap", "rerotate"] = "auto"
    on_full: Literal["evict", "error"] = "evict"
    seed: int = 0

    @property
    def most_tokens(self) -> int:
        """That a conversation has on the device at once."""
        return self.window if self.evictor == "none" else self.budget_tokens

    @property
    def limit(self) -> int | None:
        """Tokens that a conversation may come to, with its last answer; None: any number."""
        return self.window if self.evictor == "none" and self.window else None

    def limit_of(self, params: SamplingParams) -> int | None:
        """The same at the end of a turn with these parameters, which may say less."""
        known = [most for most in (self.limit, length_limit(params)) if most is not None]
        return min(known, default=None)

    def limits(self, params: Sequence[SamplingParams]) -> NDArray[np.int64]:
        """[params] the same of each; no limit is a number that nothing reaches."""
        known = map(self.limit_of, params)
        return np.array([_NO_LIMIT if most is None else most for most in known], np.int64)

    def fit(self, params: SamplingParams, tokens: int) -> SamplingParams | None:
        """Parameters of a turn whose prompt, with all that was said before, has so many tokens: its
        answer gets what is left. None: nothing is, see `why_full`."""
        fitted = end_at(params, tokens)
        if fitted is None or self.limit is None:
            return fitted
        left = self.limit - tokens
        if left < 1:
            return None
        return replace(fitted, max_new_tokens=min(fitted.max_new_tokens, left))

    def why_full(self, params: SamplingParams, tokens: str) -> str:
        """One sentence why a turn that has so many `tokens` with all before it cannot run."""
        said = f"the conversation has {tokens} tokens with this turn, "
        own = length_limit(params)
        if own is not None and own == self.limit_of(params):
            return (
                f"{said}and the max_length of the model's generation_config.json allows {own} for "
                "all of them and the answer; choose --max-new-tokens, or end it earlier"
            )
        return f"{said}the model's window {self.window}; choose --evict, or end it earlier"


@dataclass(frozen=True, eq=False)
class ConversationPlan:
    """The turns of a plan's sequences. Arrays int64 but the keys.

    Turns of sequence s, in order: `bounds[s] .. bounds[s + 1]`. By turn: `row` of the plan's table,
    which holds the first prompt of a conversation and of later turns what they add; `params`, an
    index into the plan's; `noise_key` uint64. `system_tokens` [sequences]: as many of the first
    prompt are its system prompt.
    """

    eviction: Eviction
    bounds: NDArray[np.int64]
    row: NDArray[np.int64]
    params: NDArray[np.int64]
    noise_key: NDArray[np.uint64]
    system_tokens: NDArray[np.int64]

    def turns(self, sequence: int) -> range:
        """Of one sequence, as indices into the arrays."""
        return range(int(self.bounds[sequence]), int(self.bounds[sequence + 1]))

    def only(self, sequences: NDArray[np.int64]) -> ConversationPlan:
        """The same turns of these sequences, which are numbered anew."""
        turns, bounds = self._turns_of(sequences)
        return replace(
            self,
            bounds=bounds,
            row=self.row[turns],
            params=self.params[turns],
            noise_key=self.noise_key[turns],
            system_tokens=self.system_tokens[sequences],
        )

    def most_tokens(
        self, added: NDArray[np.int64], params: Sequence[SamplingParams]
    ) -> NDArray[np.int64]:
        """[sequences] tokens that each has KV of at its end, or at once where some must go: `added`
        [turns] by prompts; `params` of the plan."""
        new = np.array([chosen.max_new_tokens for chosen in params], np.int64)[self.params]
        total = self.totals(added + new) - 1
        limits = self.eviction.limits(params)[self.params]
        most = np.maximum.reduceat(limits, self.bounds[:-1]) if len(limits) else total
        return np.minimum(np.minimum(total, most), self.eviction.most_tokens or total)

    def totals(self, of_turn: NDArray[np.int64]) -> NDArray[np.int64]:
        """[sequences] sums of what is known by turn."""
        upto = np.append(0, np.cumsum(of_turn))
        totals: NDArray[np.int64] = upto[self.bounds[1:]] - upto[self.bounds[:-1]]
        return totals

    def later_turns(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turns of these sequences that are not their first."""
        turns, bounds = self._turns_of(sequences)
        return np.delete(turns, bounds[:-1])

    def _turns_of(
        self, sequences: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = np.diff(self.bounds)[sequences]
        bounds = np.append(0, np.cumsum(counts))
        offset = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)
        return np.repeat(self.bounds[sequences], counts) + offset, bounds


def join_ids(last: int, added: Ids) -> NDArray[np.int64]:
    """What a later turn feeds: the last token of the answer before, then what the turn adds; a
    token that ends the one and begins the other is there once."""
    ids = added.astype(np.int64)
    return ids if len(ids) and ids[0] == last else np.append(np.int64(last), ids)
