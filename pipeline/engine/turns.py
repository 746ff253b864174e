"""The turns of conversations: what a turn feeds, when tokens must go, and what it says at its end.

```
 admitted ─► first turn (as any row) ─► its end ─► begin: evict, place, prefill ─► decode ─► its end
                                          ▲                                                   │
                                          └──────────────── more turns ───────────────────────┘
```

A conversation runs from its first turn to its last and keeps its place on the device between them.
"""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.completions import fail_turn
from pipeline.engine.conversation import Conversation, TurnPlacement
from pipeline.engine.evictions import Evictions
from pipeline.engine.health import is_degenerate
from pipeline.engine.kept_kv import KeptKV
from pipeline.engine.live import FIRST_NEW_TOKENS, LiveRow, PrefillJob
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.spans import KVSpan
from pipeline.engine.watching import Watcher, conversation_of, joined
from pipeline.plan.conversations import CONTEXT_EXCEEDED, join_ids
from pipeline.plan.failed_turns import fail_later
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams

BEGIN_ABOVE = 0.25
"""Turns begin together, when so many of the live conversations wait: prefill stays packed."""


class _Refusal(NamedTuple):
    """Why a turn cannot run: the type of the error, and a sentence."""

    error_type: str
    message: str


class Turns:
    """The conversations of one run of the engine."""

    def __init__(
        self, plan: Plan, scheduler: Scheduler, kept: KeptKV, begun: set[tuple[int, int]]
    ) -> None:
        """`begun`: (sequence, turn) whose prompts were computed before; more come to it."""
        assert plan.conversations is not None
        self._begun = begun
        self._plan = plan
        self._turns = plan.conversations
        self._eviction = plan.conversations.eviction
        self._scheduler = scheduler
        self.watcher = Watcher(self._eviction, kept)
        self.evictions = Evictions(self._eviction, scheduler, kept, self.watcher)

    def replays(self) -> list[PrefillJob]:
        """The next piece of each live conversation that must be computed again, up to where what it
        keeps was changed; none when all are as they were."""
        jobs = []
        for row in list(self._scheduler.rows):
            conversation = conversation_of(row)
            if row not in self._scheduler.rows:  # it has given way to one before
                continue
            expected, stop = self._expected_again(conversation)
            stop = min(stop, self.evictions.repeat(row, expected))
            if not conversation.is_behind or not self._scheduler.has_place(row):
                continue
            ids = np.array(conversation.ids[conversation.computed : stop], np.int64)
            if self._lengthen(row, conversation, len(ids)):
                self._place(row, conversation, ids)
                row.end = conversation.question_end - conversation.offset
                jobs.append(PrefillJob(row, ids, row.place.start, is_repeat=True))
        return jobs

    def begin(self, now_s: float, is_draining: bool) -> tuple[list[PrefillJob], list[Completion]]:
        """Prompts of turns that begin now, and turns that cannot. When draining none begins, and
        conversations between two turns leave."""
        rows = self._scheduler.rows
        waiting = [row for row in rows if row.is_waiting]
        if is_draining:
            for row in waiting:
                self._finish(row)
            return [], []
        if len(waiting) < len(rows) and len(waiting) < BEGIN_ABOVE * len(rows):
            return [], []
        jobs: list[PrefillJob] = []
        failed: list[Completion] = []
        for row in waiting:
            if row in rows:  # or it had to give way to one before
                self._begin(row, now_s, jobs, failed)
        return jobs, failed

    def end(self, row: LiveRow, completion: Completion, now_s: float) -> list[Completion]:
        """The current turn has got `completion`; the conversation waits for its next one, or is
        over. After a failed turn there is none."""
        if row.is_waiting:  # memory ended while it was computed again: its turn has its answer
            return self._fail_next(row, completion, now_s)
        conversation, watch = conversation_of(row), self.watcher.of(row)
        repeats = is_degenerate(completion.token_ids, watch.answer)
        self.watcher.measure(row)
        if not conversation.number:
            watch.health.prefilled(conversation.first_prompt)
        watch.health.key_turns = conversation.key_turns
        numbers, _ = joined(conversation, conversation.runs(row.place))
        state = watch.health.state(conversation.computed, numbers, repeats)
        has_failed = completion.finish_reason == "error"
        done = [
            replace(
                completion,
                turn=conversation.number,
                prompt_tokens=conversation.question_end,
                state=None if has_failed else state,
            )
        ]
        if has_failed:
            done += fail_later(self._plan, row.sequence, conversation.number, now_s)
        if has_failed or conversation.is_last_turn:
            self._finish(row)
            return done
        row.is_waiting = True
        row.num_answered += len(row.token_ids)
        self.watcher.renew(row)
        self._scheduler.changes += 1
        return done

    def _fail_next(self, row: LiveRow, completion: Completion, now_s: float) -> list[Completion]:
        number = conversation_of(row).number + 1
        self._finish(row)
        later = fail_later(self._plan, row.sequence, number, now_s)
        return [replace(completion, turn=number, cached_tokens=0), *later]

    def _begin(
        self, row: LiveRow, now_s: float, jobs: list[PrefillJob], failed: list[Completion]
    ) -> None:
        conversation = conversation_of(row)
        number = conversation.number + 1
        turn = conversation.turns[number]
        added = self._plan.table[int(self._turns.row[turn])]
        fed = join_ids(row.token_ids[-1], added)
        params = self._fit(conversation, len(fed), self._plan.params[int(self._turns.params[turn])])
        if isinstance(params, _Refusal):
            failed.append(fail_turn(row.sequence, number, *params, now_s))
            failed += fail_later(self._plan, row.sequence, number, now_s)
            self._finish(row)
            return
        self.evictions.prepare(row, len(fed), params.max_new_tokens)
        more = min(FIRST_NEW_TOKENS, params.max_new_tokens) - 1
        more = min(more, max(0, conversation.room - len(fed)))
        has_place = self._scheduler.has_place(row)
        if not has_place or not self._lengthen(row, conversation, len(fed), more):
            return
        watch = self.watcher.of(row)
        watch.answer, watch.health.history_tokens = row.token_ids, len(conversation.ids) + 1
        row.params = params
        row.noise_key = int(self._turns.noise_key[turn])
        row.cached_tokens, row.admitted_s = conversation.computed, now_s
        row.token_ids, row.logprobs, row.is_waiting = [], [], False
        row.guide, row.counts = None, None
        row.end = conversation.next_position + len(fed)
        self._place(row, conversation, fed)
        conversation.number = number
        conversation.ask(fed)
        is_repeat = (row.sequence, number) in self._begun  # the KV of a shared prefix has changed
        self._begun.add((row.sequence, number))
        jobs.append(PrefillJob(row, fed, row.place.start, is_repeat))

    def _expected_again(self, conversation: Conversation) -> tuple[int, int]:
        """Of a conversation that is computed again: tokens that were expected at this point, and
        the number of the first one of the next turn."""
        if self._eviction.evictor == "none":
            return 1, len(conversation.ids)
        starts, now = conversation.turn_starts, conversation.computed
        after = bisect.bisect_right(starts, now)
        stop = starts[after] if after < len(starts) else len(conversation.ids)
        if after < 2 or starts[after - 1] != now or not conversation.is_behind:
            return 1, stop
        turn = conversation.turns[after - 1]
        fed = join_ids(conversation.ids[now], self._plan.table[int(self._turns.row[turn])])
        params = self._plan.params[int(self._turns.params[turn])]
        return len(fed) + params.max_new_tokens, stop

    def _fit(
        self, conversation: Conversation, fed: int, params: SamplingParams
    ) -> SamplingParams | _Refusal:
        """Parameters of the next turn, which feeds so many tokens, or why it cannot run."""
        eviction, history = self._eviction, len(conversation.ids) + fed
        fitted = eviction.fit(params, history)
        if fitted is None:
            return _Refusal(CONTEXT_EXCEEDED, eviction.why_full(params, str(history)))
        if eviction.evictor == "none":
            return fitted
        stays = 0 if eviction.evictor == "window" else conversation.system
        if stays + fed + 1 > eviction.budget_tokens:
            return _Refusal(
                "TurnTooLong",
                f"this turn has {fed} tokens, and beside the {stays} that always stay there is "
                f"room for {eviction.budget_tokens - stays - 1}; raise --budget-tokens",
            )
        if eviction.on_full == "error" and fed + params.max_new_tokens > conversation.room:
            return _Refusal(
                "HistoryFull",
                f"{conversation.num_kept} kept tokens, {fed} of this turn and an answer of up to "
                f"{params.max_new_tokens} exceed --budget-tokens {eviction.budget_tokens}, and "
                "--on-full error evicts nothing",
            )
        return fitted

    def _lengthen(
        self, row: LiveRow, conversation: Conversation, count: int, more: int = 0
    ) -> bool:
        """See `Scheduler.lengthen`: slots for the next `count` tokens and, where these need some,
        for `more` behind them. Else the next token would not go into the row's last block."""
        end = conversation.next_position + count
        begin = max(row.reserved_end, conversation.next_position)
        return end <= begin or self._scheduler.lengthen(row, begin, end + more)

    def _place(self, row: LiveRow, conversation: Conversation, fed: NDArray[np.int64]) -> None:
        first = conversation.first_place
        span = KVSpan(length=len(fed))
        row.place = TurnPlacement(span, conversation.next_position, first.above, conversation)
        self._scheduler.changes += 1

    def _finish(self, row: LiveRow) -> None:
        self.watcher.forget(row)
        self._scheduler.finish(row)
