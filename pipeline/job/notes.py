"""What a person should know of a run beside its numbers: told once, and kept in run.json.

```
 job, plan, engine, KV store ──► RunNotes ──► observer (a terminal, a log), and Python's log
                                    └───────► run.json ──► status, report, kvcoppice.Run.notes
```
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.job.advised_plan import warn_of
from pipeline.job.observer import Observer
from pipeline.job.planning import PlannedJob


class RunNotes:
    """Of one session. `kept`: what run.json has of them, which has those of an engine apart."""

    def __init__(self, planned: PlannedJob, observer: Observer) -> None:
        job = planned.job
        self._observer = observer
        self._warnings = [*job.source.columns.unheeded(), *warn_of(planned)]
        told = [job.source.summary] if job.source.summary else []  # when the input was opened
        self._to_tell = list(dict.fromkeys([*job.describe(), *self._warnings]))
        self.kept = [*told, *self._to_tell]

    def tell(self, of_engine: Iterable[str]) -> None:
        """Tell what is known before the first row."""
        for line in self._to_tell:
            self._observer.note(line, line in self._warnings)
        for line in of_engine:
            self._observer.note(line)

    def add(self, line: str, is_warning: bool = False) -> None:
        """Tell what became known since."""
        self.kept.append(line)
        self._observer.note(line, is_warning)


def headline(planned: PlannedJob, rows_before: int, tokens_left: int) -> str:
    """How much there is to do, in a line."""
    total, unique = planned.count_tokens()
    saving = 1.0 - unique / total if total else 0.0
    resumed = f" ({rows_before} done before)" if rows_before else ""
    plan = planned.job.settings.plan
    rows = f"{len(planned.rows)} rows"
    if plan.num_shards > 1:
        rows = f"{len(planned.rows)} of {len(planned.ids)} rows"
        rows = f"shard {plan.shard_number} of {plan.num_shards}: {rows}"
    if planned.plan.conversations is not None:
        return f"{rows}{resumed}, turns of conversations, at most {unique} tokens to compute"
    if planned.requests is not None:
        rows = f"{rows}{resumed} to score"
        return f"{rows}, {total} tokens of requests, {unique} to compute ({saving:.1%} saved)"
    left = f"{unique} to compute"
    if rows_before:
        left = f"{left}, {tokens_left} of them now"
    return f"{rows}{resumed}, {total} prompt tokens, {left} ({saving:.1%} saved)"
