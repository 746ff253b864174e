"""An engine without a model: answers with the end of the prompt, reversed. For tests and dry runs.

A turn of a conversation is such a prompt, with all that was said before. It shares nothing and
knows nothing about text, so whatever a job does around it can be checked by hand: same prompt, same
answer, always.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipeline.engine.base import EngineCapabilities, EngineHooks, Indices, LocalEngine, RunControl
from pipeline.engine.resent import Turn, answer_in_order
from pipeline.plan.plan import Plan
from pipeline.records import Completion, Timing


class EchoEngine(LocalEngine):
    """Answers sequence s with the last `max_new_tokens` ids of its prompt, reversed."""

    name = "echo"
    capabilities = EngineCapabilities(carries_conversations=True)

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        """One turn after the other; none after a drain or abort."""
        started = time.perf_counter()
        return answer_in_order(
            plan, sequences, control, hooks, lambda turn: self._answer(turn, started)
        )

    def _answer(self, turn: Turn, started: float) -> Completion:
        before = time.perf_counter()
        answer = tuple(turn.prompt[-turn.params.max_new_tokens :][::-1])
        after = time.perf_counter()
        self.counters.prefilled_tokens += len(turn.prompt)
        self.counters.generated_tokens += len(answer)
        self.counters.num_forwards += 1
        self.counters.busy_s += after - before
        self.counters.span_s = after - started
        timing = Timing(queue_s=before - started, ttft_s=after - started, latency_s=after - started)
        return Completion(turn.sequence, answer, "length", cached_tokens=0, timing=timing)
