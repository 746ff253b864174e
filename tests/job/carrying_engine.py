"""An engine of conversations without a model: what it says follows from the ids so far, and from
what it was told to keep. Counts as an engine that carries KV does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pipeline.engine.base import (
    EngineCapabilities,
    EngineHooks,
    Indices,
    LocalEngine,
    RunControl,
)
from pipeline.engine.resent import ResentSequence, Turn
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn, EvictionEvent, Timing

_LETTERS = (2, 3, 24)  # a, b and w of the tokenizer of tests: so begin some of their turns


class CarryingEngine(LocalEngine):
    """One turn of each conversation, then the next of each. `act` is called before each completion
    with its number."""

    name = "carrying"
    capabilities = EngineCapabilities(computes_once=True, carries_conversations=True, evicts=True)

    def __init__(
        self,
        act: Callable[[int], object] = lambda number: None,
        fails: Callable[[Turn], bool] = lambda turn: False,
    ) -> None:
        super().__init__()
        self.asked: dict[int, tuple[EarlierTurn, ...]] = {}
        self._act = act
        self._fails = fails

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        computed: set[tuple[int, ...]] = set()
        if hooks.earlier_turns is not None:
            self.asked = {s: tuple(hooks.earlier_turns(s)) for s in sequences.tolist()}
        for earlier in self.asked.values():
            for done in earlier:
                assert done.eviction_log == log_of(done.token_ids), "a log of another turn"
        running = [ResentSequence(plan, s, hooks) for s in sequences.tolist()]
        number = 0
        while running:
            going = list(running)
            for one in going:
                if control.should_drain() or control.should_abort():
                    return
                turn = one.next_turn()
                if turn is None:
                    running.remove(one)
                    yield from one.refused()
                    continue
                self._act(number)
                number += 1
                yield _with_log(one.complete(self._answer(turn, computed)))

    def _answer(self, turn: Turn, computed: set[tuple[int, ...]]) -> Completion:
        known = turn.history_tokens - 1 if turn.number else 0
        beginnings = {tuple(turn.prompt[:end]) for end in range(known + 1, len(turn.prompt) + 1)}
        new = beginnings if turn.number else beginnings - computed
        computed |= new
        cached = len(turn.prompt) - len(new)
        self.counters.prefilled_tokens += len(new)
        self.counters.cached_tokens += cached
        if self._fails(turn):
            return Completion(turn.sequence, (), "error", 0, Timing(), "OutOfMemory", "no room")
        ids = says(turn.prompt, turn.params.max_new_tokens)
        self.counters.generated_tokens += len(ids)
        return Completion(turn.sequence, ids, "length", cached, Timing())


def _with_log(completion: Completion) -> Completion:
    if completion.state is None:
        return completion
    log = log_of(completion.token_ids)
    state = replace(completion.state, evictions=len(log), eviction_log=log)
    return replace(completion, state=state)


def says(prompt: Sequence[int], most: int) -> tuple[int, ...]:
    """1 to `most` letters."""
    digest = hashlib.sha256(repr(list(prompt)).encode()).digest()
    return tuple(_LETTERS[digest[1 + at] % 3] for at in range(1 + digest[0] % most))


def log_of(token_ids: Sequence[int]) -> tuple[EvictionEvent, ...]:
    """Some that follow from the answer."""
    first = sum(token_ids)
    if first % 3 == 0:
        return ()
    if first % 3 == 1:
        return (EvictionEvent(first + 9, ((0, 2, 5, first + 9),)),)
    return (EvictionEvent(first + 9, ((0, 3), (1, 2, 4, 6))), EvictionEvent(99, ((7, 99),)))
