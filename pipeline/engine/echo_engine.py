"""An engine without a model: answers with the end of the prompt, reversed. For tests and dry runs.

It shares nothing and knows nothing about text, so whatever a job does around it can be checked by
hand: same prompt, same answer, always.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipeline.engine.base import EngineHooks, Indices, LocalEngine, RunControl, one_at_a_time
from pipeline.plan.plan import Plan
from pipeline.records import Completion, Timing


class EchoEngine(LocalEngine):
    """Answers sequence s with the last `max_new_tokens` ids of its prompt, reversed."""

    name = "echo"

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        """One completion for each of `sequences`, in order; none after a drain or abort."""
        started = time.perf_counter()
        most = plan.max_new_tokens
        for sequence in one_at_a_time(sequences, control):
            before = time.perf_counter()
            prompt = plan.prompt_token_ids(sequence)
            answer = tuple(prompt[-int(most[sequence]) :][::-1].tolist())
            after = time.perf_counter()
            self.counters.prefilled_tokens += len(prompt)
            self.counters.generated_tokens += len(answer)
            self.counters.num_forwards += 1
            self.counters.busy_s += after - before
            self.counters.span_s = after - started
            timing = Timing(
                queue_s=before - started, ttft_s=after - started, latency_s=after - started
            )
            yield Completion(sequence, answer, "length", cached_tokens=0, timing=timing)
