"""What becomes of the turns behind one that has failed. Knows neither why it did nor who ran it."""

from __future__ import annotations

from pipeline.plan.plan import Plan
from pipeline.records import Completion


def fail_later(plan: Plan, sequence: int, turn: int, queue_s: float = 0.0) -> list[Completion]:
    """The turns of a conversation after number `turn`, which has failed."""
    return [
        Completion.after_failed(sequence, later, queue_s)
        for later in range(turn + 1, plan.num_turns(sequence))
    ]
