"""One arm of this environment on one job, alone in its process: `python -m benchmarks.arm ARM JOB
ANSWER`. See `job` for what goes in and what comes out, `transformers_arms` for the plain ones.

Ours: `prefix` (the product), `unshared` (the product with every row a tenant of its own, so that
nothing is reused), `naive` (the audit's baseline: plain `generate`, one prompt after the other),
`carry` (the product with the turns of conversations as such: all of them are one batch).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.job import Job
from benchmarks.peers.answering import answer_batches
from benchmarks.prompts import Prompts, plan_prompts
from benchmarks.transformers_arms import ContinuousArm, GenerateArm
from benchmarks.turns import EvictionClock, plan_turns
from pipeline.engine.base import RunControl
from pipeline.engine.load import make_engine
from pipeline.model.shape import read_shape
from pipeline.plan.conversations import Eviction
from pipeline.records import TurnState
from pipeline.settings import JobSettings

_SPILLING = {"conversation_column": "conversation", "turn_column": "turn"}


class Arm(Protocol):
    """An engine with its weights loaded."""

    engine: str

    def generate(self, prompts: Prompts, new_tokens: int) -> Prompts:
        """Token ids by row."""
        ...

    def counters(self) -> dict[str, Any] | None:
        """Of the last call."""
        ...


class OwnArm:
    """The product's engine as `coppice run` makes it, self-test included."""

    def __init__(self, job: Job, name: str, share: bool) -> None:
        settings = JobSettings.from_flat(
            {"model": job.model, "dtype": job.dtype, "device": "cpu", "engine": name}
            | ({} if job.kv_budget is None else {"kv_budget": job.kv_budget})
            | ({} if job.spill_memory is None else _SPILLING | {"spill_memory": job.spill_memory})
        )
        self._engine = make_engine(settings)
        if self._engine.name != name:
            raise RuntimeError("; ".join(self._engine.notes))
        self._vocabulary_size = read_shape(job.model).vocabulary_size
        self._share = share
        self.engine = f"coppice {name}, torch {torch.__version__}"

    def generate(self, prompts: Prompts, new_tokens: int) -> Prompts:
        """Plan and run."""
        plan = plan_prompts(prompts, self._vocabulary_size, new_tokens, self._share)
        done = self._engine.generate(plan, np.arange(len(plan.sequences)), RunControl())
        answers = {c.sequence: list(c.token_ids) for c in done}
        return [answers[s] for s in plan.sequence_of_row.tolist()]

    def counters(self) -> dict[str, Any]:
        """The engine's."""
        return dataclasses.asdict(self._engine.counters)


class CarryArm(OwnArm):
    """The product's engine on the turns of conversations, which are planned as such."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, "prefix", share=True)
        self._conversations = job.conversations
        self._eviction = Eviction(**(job.eviction or {}))
        self._clock = EvictionClock()
        self._states: list[TurnState] = []

    def generate(self, prompts: Prompts, new_tokens: int) -> Prompts:
        """Of all turns, as they are given: turn by turn."""
        step = self._conversations
        rounds = [prompts[low : low + step] for low in range(0, len(prompts), step)]
        plan = plan_turns(rounds, self._vocabulary_size, new_tokens, self._eviction)
        turns = plan.conversations
        assert turns is not None
        answers: list[list[int]] = [[] for _ in prompts]
        self._states = []
        with self._clock:
            for done in self._engine.generate(plan, np.arange(len(plan.sequences)), RunControl()):
                assert done.state is not None, done.error_message
                answers[int(turns.row[turns.turns(done.sequence)[done.turn]])] = [*done.token_ids]
                self._states.append(done.state)
        return answers

    def counters(self) -> dict[str, Any]:
        """The engine's, and of the evictions."""
        return super().counters() | {
            "evictions": sum(state.evictions for state in self._states),
            "most_runs": max(state.runs for state in self._states),
            "eviction_s": self._clock.seconds,
        }


def make_arm(name: str, job: Job) -> Arm:
    """The arm of that name, ready."""
    if name == "generate":
        return GenerateArm(job)
    if name == "generate_batch":
        return ContinuousArm(job)
    if name == "carry":
        return CarryArm(job)
    return OwnArm(job, "naive" if name == "naive" else "prefix", share=name != "unshared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["prefix", "unshared", "naive", "generate", "generate_batch", "carry"]
    parser.add_argument("arm", choices=names)
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    job = Job.read(args.job)
    arm = make_arm(args.arm, job)
    arm.generate([list(job.warm_up)], 2)
    answer_batches(
        args.answer,
        arm.engine,
        dataclasses.asdict(job),
        lambda prompts: arm.generate(prompts, job.new_tokens),
        counters=arm.counters,
    )


if __name__ == "__main__":
    main()
