"""One arm of this environment on one job, alone in its process: `python -m benchmarks.arm ARM JOB
ANSWER`. See `job` for what goes in and what comes out, `transformers_arms` for the plain ones.

Ours: `prefix` (the product), `unshared` (the product with every row a tenant of its own, so that
nothing is reused), `naive` (the audit's baseline: plain `generate`, one prompt after the other).
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
from pipeline.engine.base import RunControl
from pipeline.engine.load import make_engine
from pipeline.model.shape import read_shape
from pipeline.settings import JobSettings


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


def make_arm(name: str, job: Job) -> Arm:
    """The arm of that name, ready."""
    if name == "generate":
        return GenerateArm(job)
    if name == "generate_batch":
        return ContinuousArm(job)
    return OwnArm(job, "naive" if name == "naive" else "prefix", share=name != "unshared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["prefix", "unshared", "naive", "generate", "generate_batch"]
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
        job.asked_at,
        job.batches,
        lambda prompts: arm.generate(prompts, job.new_tokens),
        counters=arm.counters,
    )


if __name__ == "__main__":
    main()
