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

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.token_table import Ids

Evictor = Literal[
    "none", "window", "oldest", "gist", "gist-recent", "sink-recent", "attention-top", "h2o",
    "snapkv", "random",
]  # fmt: skip
BY_WEIGHTS: tuple[Evictor, ...] = ("attention-top", "h2o", "snapkv")
"""Those that ask how much attention a token got."""
BY_HEAD: tuple[Evictor, ...] = ("h2o", "snapkv")
"""Those that keep other tokens in each layer and head."""


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
