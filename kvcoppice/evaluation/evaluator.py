"""One engine for the calls of an evaluation, each of which is one plan over all that it asks.

```
 asked ──(kept by an earlier call)──────────────────────────► results
   └──(the others)──► table ──► plan ──► engine ──► kept ───────┘
```

Knows token ids, not text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcoppice.evaluation.kept_results import KeptResults
from pipeline.engine.base import RunControl, StopCheck
from pipeline.engine.load import make_engine
from pipeline.errors import EngineError, ModelError
from pipeline.job.device_lock import holding_device
from pipeline.job.observer import Observer
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.scores import plan_scores
from pipeline.plan.token_table import Batch, TokenTable, narrowest_dtype
from pipeline.records import Completion, SamplingParams, Scored
from pipeline.settings import JobSettings

Tokens = NDArray[np.uint32]
_NO_TOKENS = np.zeros(0, np.uint32)
_AT_ONCE = 1 << 20  # tokens


class Request(NamedTuple):
    """How likely is the continuation, of one token or more, below the context, of one or more?"""

    context: Tokens
    continuation: Tokens


class Prompt(NamedTuple):
    """What follows these ids? `draw`: how many equal ones were asked before, which sampling tells
    apart."""

    ids: Tokens
    params: SamplingParams
    draw: int = 0

    @property
    def name(self) -> str:
        """What its noise follows from, whatever else is asked; greedy ones need none."""
        if self.params.is_greedy:
            return ""
        return f"{hashlib.blake2b(self.ids.tobytes(), digest_size=16).hexdigest()} {self.draw}"


@dataclass
class Counts:
    """Of one call: what it asked, found kept, and computed. Tokens are those that are fed."""

    asked: int = 0
    kept: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    computed_tokens: int = 0
    positions_read: int = 0

    def __str__(self) -> str:
        kept = f", {self.kept:,} kept from before" if self.kept else ""
        read = f", {self.positions_read:,} positions read" if self.positions_read else ""
        return (
            f"{self.asked:,} requests{kept}: {self.tokens:,} tokens, "
            f"{self.computed_tokens:,} computed, {self.unique_tokens:,} are distinct{read}"
        )


class Evaluator:
    """Raises what loading a model raises. The device is held while it computes, and not between."""

    def __init__(
        self, settings: JobSettings, observer: Observer, kept: KeptResults | None = None
    ) -> None:
        self._settings = settings
        self._observer = observer
        self._kept = kept
        self.counts = Counts()
        with holding_device(settings, observer):
            self.engine = make_engine(settings)
        for note in self.engine.notes:
            observer.note(note)

    def scores(
        self, requests: Sequence[Request], vocabulary_size: int
    ) -> Iterator[tuple[int, Scored]]:
        """(number of a request, its scores), every request once, as they come.

        Raises EngineError where a score is no number; what came before is kept.
        """
        if not self.engine.capabilities.reads_scores:
            raise ModelError(
                f"{'; '.join(self.engine.notes)}; that one reads no scores, so evaluate this model "
                "by --model hf"
            )
        keys = [self._key("score", r.context, r.continuation) for r in requests]
        found = self._find(keys)
        for number, result in found.items():
            logprobs, is_greedy = json.loads(result)
            yield number, Scored(tuple(logprobs), is_greedy)
        left = [number for number in range(len(requests)) if number not in found]
        plan = plan_requests([requests[number] for number in left], vocabulary_size)
        scores = plan.scores
        assert scores is not None
        for done in self._run(plan, len(found), RunControl()):
            low, high = scores.bounds[done.sequence : done.sequence + 2].tolist()
            for index, scored in zip(scores.request[low:high].tolist(), done.scores, strict=True):
                number = left[index]
                self._keep(keys[number], json.dumps([scored.logprobs, scored.is_greedy]))
                yield number, scored

    def answers(
        self, prompts: Sequence[Prompt], vocabulary_size: int, is_stopped: StopCheck
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(number of a prompt, the ids that follow it), every prompt once, as they come.

        Raises EngineError where one cannot be answered; what came before is kept.
        """
        keys = [self._key("answer", p.ids, repr((p.params, p.draw))) for p in prompts]
        found = self._find(keys)
        for number, result in found.items():
            yield number, tuple(json.loads(result))
        left = [number for number in range(len(prompts)) if number not in found]
        plan = plan_prompts([prompts[number] for number in left], vocabulary_size)
        rows: dict[int, list[int]] = {}
        for number, sequence in zip(left, plan.sequence_of_row.tolist(), strict=True):
            rows.setdefault(sequence, []).append(number)
        for done in self._run(plan, len(found), RunControl(is_stopped=is_stopped)):
            for number in rows[done.sequence]:
                self._keep(keys[number], json.dumps(done.token_ids))
                yield number, done.token_ids

    def _run(self, plan: Plan, kept: int, control: RunControl) -> Iterator[Completion]:
        points = 0 if plan.scores is None else plan.scores.num_points
        self.counts = Counts(
            kept + len(plan.table), kept, int(plan.table.lengths.sum()), plan.tree.unique_tokens,
            positions_read=points,
        )  # fmt: skip
        every = np.arange(len(plan.sequences))
        if not len(every):
            return
        try:
            with holding_device(self._settings, self._observer):
                for done in self.engine.generate(plan, every, control):
                    self.counts.computed_tokens = self.engine.counters.prefilled_tokens
                    if done.error_type is not None:
                        raise EngineError(f"{done.error_type}: {done.error_message}")
                    yield done
        finally:
            if self._kept is not None:
                self._kept.flush()

    def _key(self, kind: str, first: Tokens, second: Tokens | str) -> bytes:
        if self._kept is None:
            return b""
        rest = second.encode() if isinstance(second, str) else second.tobytes()
        return self._kept.key(kind.encode(), first.tobytes(), rest)

    def _find(self, keys: Sequence[bytes]) -> dict[int, str]:
        """By number."""
        if self._kept is None:
            return {}
        found = self._kept.find(keys)
        return {number: found[key] for number, key in enumerate(keys) if key in found}

    def _keep(self, key: bytes, result: str) -> None:
        if self._kept is not None:
            self._kept.keep(key, result)


def plan_requests(requests: Sequence[Request], vocabulary_size: int) -> Plan:
    """One tree over them all, and what is read of it."""
    fed = (np.concatenate([r.context, r.continuation[:-1]]) for r in requests)
    table = _table_of(fed, vocabulary_size)
    params, of_row = (SamplingParams(max_new_tokens=1),), np.zeros(len(requests), np.int64)
    plan = build_plan(table, [""] * len(requests), params, of_row)
    flat = np.concatenate([_NO_TOKENS, *(r.continuation for r in requests)])
    lengths = np.array([len(r.continuation) for r in requests], np.int64)
    contexts = np.array([len(r.context) for r in requests], np.int64)
    scores = plan_scores(
        plan.tree, plan.sequences.prompt, plan.sequence_of_row, contexts, (flat, lengths)
    )
    return replace(plan, scores=scores)


def plan_prompts(prompts: Sequence[Prompt], vocabulary_size: int) -> Plan:
    """One tree over them all."""
    table = _table_of((p.ids for p in prompts), vocabulary_size)
    numbers = {params: i for i, params in enumerate(dict.fromkeys(p.params for p in prompts))}
    of_row = np.array([numbers[p.params] for p in prompts], np.int64)
    return build_plan(table, [p.name for p in prompts], tuple(numbers), of_row)


def _table_of(rows: Iterable[Tokens], vocabulary_size: int) -> TokenTable:
    """Raises ModelError for an id that the model has not."""
    dtype = narrowest_dtype(vocabulary_size)

    def batches() -> Iterator[Batch]:
        for some in _portions(rows):
            flat = np.concatenate(some)
            most = int(flat.max(initial=0))
            if most >= vocabulary_size:
                raise ModelError(
                    f"the tokenizer gives the id {most}, and the model has {vocabulary_size} of "
                    "them; they do not belong together"
                )
            yield flat.astype(dtype), [len(ids) for ids in some]

    return TokenTable.from_batches(batches(), dtype)


def _portions(rows: Iterable[Tokens]) -> Iterator[list[Tokens]]:
    """In order, about a million tokens at a time, since a table takes a few copies of each."""
    some: list[Tokens] = []
    tokens = 0
    for ids in rows:
        some.append(ids)
        tokens += len(ids)
        if tokens > _AT_ONCE:
            yield some
            some, tokens = [], 0
    if some:
        yield some


def number_draws(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same, and equal ones that are sampled told apart."""
    asked: Counter[tuple[bytes, SamplingParams]] = Counter()
    found = []
    for prompt in prompts:
        if not prompt.params.is_greedy:
            key = (prompt.ids.tobytes(), prompt.params)
            prompt = prompt._replace(draw=asked[key])
            asked[key] += 1
        found.append(prompt)
    return found
