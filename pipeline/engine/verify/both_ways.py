"""The same sequences in full and with documents reused, by one engine: what each way would say.

```
 in full          prompt ─► greedy answer, and its logits at some positions
 with documents   prompt ─► given that answer token by token, compared position by position
```

A way that would choose every token of an answer, given those before it, would write that answer, so
no third pass is needed; but for rows whose logits go through rules, or whose answers have a form.
What is chosen after that no hook sees, and these rows are answered once more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.base import Engine, EngineHooks, ForceTokens, RunControl
from pipeline.engine.divergence import divergence
from pipeline.engine.sampler import has_rules
from pipeline.engine.sampling import likeliest_token
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams

MOST_TOKENS: Final = 64
"""Of each answer."""
_MOST_LOGIT_BYTES = 512 << 20
_UNSEEN: Final = -1


class Difference(NamedTuple):
    """Between the two ways of one sequence: whether both give the same greedy answer.

    Given that of full attention, by position: `same_choice` bool, whether the likeliest token is
    the same; `kl` float64, of those that were compared, from full attention's distribution, nats.
    """

    is_same: bool
    same_choice: NDArray[np.bool_]
    kl: NDArray[np.float64]


@dataclass
class Cost:
    """What both ways took so far."""

    seconds: float = 0.0
    prefilled_tokens: int = 0
    generated_tokens: int = 0


class BothWays:
    """Computes sequences of `moved`, a plan that reuses documents, and of `full`, the same one
    without; all of them greedy, whatever they are sampled with."""

    def __init__(self, engine: Engine, moved: Plan, full: Plan, control: RunControl) -> None:
        """Raises EngineError where the engine cannot do it."""
        self.cost = Cost()
        self._engine, self._control = engine, control
        self._moved, self._full = _greedy(moved), _greedy(full)
        engine.capabilities.check(moved, EngineHooks(lambda *_: None, lambda *_: []))

    def compare(self, sequences: NDArray[np.int64]) -> dict[int, Difference] | None:
        """By sequence; what full attention cannot answer is left out. None where it was stopped."""
        if not len(sequences):
            return {}
        notes = _Notes(sequences, int(self._full.max_new_tokens[sequences].max(initial=1)))
        full = self._generate(self._full, sequences, EngineHooks(notes.keep))
        answers = {s: done.token_ids for s, done in full.items() if not done.error_type}
        answered = np.array(sorted(answers), np.int64)
        hooks = EngineHooks(notes.compare, _forcing(answers))
        moved = self._generate(_ending_with(self._moved, answers), answered, hooks)
        ruled = answered[[self._is_ruled(s) for s in answered.tolist()]]
        again = self._generate(self._moved, ruled, EngineHooks())
        if min(len(full) - len(sequences), len(moved) - len(answers), len(again) - len(ruled)) < 0:
            return None
        found = {}
        for s, tokens in answers.items():
            same_choice, kl = notes.of(s, len(tokens))
            is_same = again[s].token_ids == tokens if s in again else bool(same_choice.all())
            has_failed = moved[s].error_type or (s in again and again[s].error_type)
            found[s] = Difference(is_same and not has_failed, same_choice, kl)
        return found

    def _is_ruled(self, sequence: int) -> bool:
        params = self._full.params[int(self._full.sequences.params[sequence])]
        return has_rules(params) or params.is_guided

    def _generate(
        self, plan: Plan, sequences: NDArray[np.int64], hooks: EngineHooks
    ) -> dict[int, Completion]:
        if not len(sequences):
            return {}
        begin = time.monotonic()
        done = {c.sequence: c for c in self._engine.generate(plan, sequences, self._control, hooks)}
        self.cost.seconds += time.monotonic() - begin
        self.cost.prefilled_tokens += self._engine.counters.prefilled_tokens
        self.cost.generated_tokens += self._engine.counters.generated_tokens
        return done


class _Notes:
    """What was seen of each sequence: the likeliest tokens of both ways, and how far apart they
    are at every n-th position, so that the logits of full attention fit into half a gigabyte."""

    def __init__(self, sequences: NDArray[np.int64], most_tokens: int) -> None:
        self._place = {s: i for i, s in enumerate(sequences.tolist())}
        size = (len(sequences), most_tokens)
        self._full, self._moved = (np.full(size, _UNSEEN, np.int64) for _ in range(2))
        self._kl = np.full(size, _UNSEEN, np.float64)
        self._logits: dict[tuple[int, int], Tensor] = {}
        self._every = 0  # not known before the first logits

    def keep(self, sequences: list[int], positions: list[int], logits: Tensor) -> None:
        """Of full attention; see `OnLogits`."""
        if not self._every:
            size = self._full.size * logits.shape[1] * logits.element_size()
            self._every = -(-size // _MOST_LOGIT_BYTES)
        places = self._note(self._full, sequences, positions, logits)
        compared = [i for i, position in enumerate(positions) if position % self._every == 0]
        kept = logits[compared].to("cpu", copy=True)
        self._logits |= {places[i]: kept[n] for n, i in enumerate(compared)}

    def compare(self, sequences: list[int], positions: list[int], logits: Tensor) -> None:
        """Of the other way; see `OnLogits`."""
        places = self._note(self._moved, sequences, positions, logits)
        compared = [i for i, place in enumerate(places) if place in self._logits]
        if not compared:
            return
        expected = torch.stack([self._logits[places[i]] for i in compared]).to(logits.device)
        full, moved = (x.float().log_softmax(-1) for x in (expected, logits[compared]))
        for i, kl in zip(compared, divergence(full, moved).tolist(), strict=True):
            self._kl[places[i]] = kl

    def of(self, sequence: int, length: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """(same choice, divergence where it was compared) at the first `length` positions."""
        place = self._place[sequence]
        same, kl = self._full[place] == self._moved[place], self._kl[place, :length]
        return same[:length], kl[kl != _UNSEEN]

    def _note(
        self,
        choices: NDArray[np.int64],
        sequences: list[int],
        positions: list[int],
        logits: Tensor,
    ) -> list[tuple[int, int]]:
        """Note the likeliest tokens; the places of these sequences and positions."""
        places = [*zip(map(self._place.__getitem__, sequences), positions, strict=True)]
        for place, token in zip(places, likeliest_token(logits).token_ids.tolist(), strict=True):
            choices[place] = token
        return places


def _greedy(plan: Plan) -> Plan:
    """The same sequences, each greedy and with an answer of at most `MOST_TOKENS`."""
    return replace(
        plan,
        params=tuple(
            replace(p, temperature=0.0, max_new_tokens=min(p.max_new_tokens, MOST_TOKENS))
            for p in plan.params
        ),
    )


def _ending_with(plan: Plan, answers: dict[int, tuple[int, ...]]) -> Plan:
    """The same sequences, each of which ends where its answer does: when a row is given its tokens,
    nothing but their number says that these were all."""
    of_length = tuple(
        SamplingParams(max_new_tokens=length, ignore_eos=True)
        for length in range(1, 1 + max(map(len, answers.values()), default=1))
    )
    chosen = np.zeros(len(plan.sequences), np.int64)
    for sequence, tokens in answers.items():
        chosen[sequence] = len(tokens) - 1
    return replace(plan, params=of_length, sequences=replace(plan.sequences, params=chosen))


def _forcing(answers: dict[int, tuple[int, ...]]) -> ForceTokens:
    def force(sequences: list[int], positions: list[int]) -> list[int]:
        return [answers[s][at] for s, at in zip(sequences, positions, strict=True)]

    return force
