"""Arms on cells, one after another, each result a JSON line the moment it is there.

A *cell* is one set of prompts in one order. An arm that fails or takes too long becomes a line that
says so, and is not asked the same again; the study goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import agreement
from benchmarks.job import Job
from benchmarks.launcher import run_arm
from benchmarks.limit import Dimensions, count_work, gemm_rates
from benchmarks.machine import describe_machine
from benchmarks.prompts import Prompts
from benchmarks.setup import Setup
from benchmarks.shapes import SHAPES


@dataclass(frozen=True)
class Cell:
    """`shared` and `rows` stand for p and G in a grid; a workload file has no p."""

    workload: str
    prompts: Prompts
    order: str = "given"
    shared: int | None = None

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def presorted(self) -> Cell:
        """The same rows as a user would sort them to help a prefix cache: by token ids."""
        return replace(self, prompts=sorted(self.prompts), order="sorted")


class Study:
    """Appends to one file of lines, which it empties first."""

    def __init__(self, setup: Setup, path: Path) -> None:
        self.setup = setup
        self._path = path
        self._model = Dimensions.of(SHAPES[setup.shape])
        self._best_flop_per_s = 0.0
        self._ours: dict[str, dict[tuple[int, ...], list[int]]] = {}
        self._given_up: dict[tuple[str, str, str], str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def measure_machine(self) -> None:
        """What the limits stand on; often, since the best one counts and machines are shared."""
        rates = gemm_rates(self._model, getattr(torch, self.setup.dtype))
        self._best_flop_per_s = max(self._best_flop_per_s, *rates.values())
        self._append(describe_machine() | {"gemm_flop_per_s": rates})

    def limit_s(self, cell: Cell, share: bool = True) -> float:
        """Counted work over the best rate measured so far."""
        work = count_work(cell.prompts, self.setup.new_tokens, share)
        return work.flop(self._model) / self._best_flop_per_s

    def run(self, arm: str, cells: list[Cell], repeat: int) -> None:
        """All cells in one process of the arm, one after the other, caches cold for each."""
        todo = []
        for cell in cells:
            if (arm, cell.workload, cell.order) in self._given_up:
                self.say(arm, cell, repeat, self._given_up[arm, cell.workload, cell.order])
            else:
                todo.append(cell)
        if not todo:
            return
        setup, load = self.setup, os.getloadavg()[0]
        job = Job(setup.model(), setup.dtype, setup.new_tokens, [c.prompts for c in todo])
        outcome = run_arm(arm, job, setup.time_limit_s)
        for cell, answer in zip(todo, outcome.answers, strict=False):
            self._add(arm, cell, repeat, answer | {"load_before": load})
        for cell in todo[len(outcome.answers) :]:
            failure = outcome.failure or "no answer"
            self._given_up[arm, cell.workload, cell.order] = f"not asked again: {failure}"
            self.say(arm, cell, repeat, failure)

    def say(self, arm: str, cell: Cell, repeat: int, failure: str) -> None:
        """A line for a cell that has no time."""
        self._append(self._describe(arm, cell, repeat) | {"seconds": None, "failure": failure})

    def _add(self, arm: str, cell: Cell, repeat: int, answer: dict[str, Any]) -> None:
        token_ids = answer.pop("token_ids")
        if arm == "prefix" and cell.workload not in self._ours:
            by_prompt = zip(map(tuple, cell.prompts), token_ids, strict=True)
            self._ours[cell.workload] = dict(by_prompt)
        ours = self._ours.get(cell.workload)
        same = None if ours is None else agreement(cell.prompts, token_ids, ours)
        digest = hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()
        self._append(
            self._describe(arm, cell, repeat)
            | {key: answer[key] for key in ("engine", "seconds", "startup_s", "load_before")}
            | {"achieved": self.limit_s(cell) / answer["seconds"]}
            | {"generated_tokens": sum(map(len, token_ids)), "token_ids_sha256": digest[:16]}
            | {"agreement": same, "counters": answer["counters"], "failure": None}
        )

    def _describe(self, arm: str, cell: Cell, repeat: int) -> dict[str, Any]:
        setup, work = self.setup, count_work(cell.prompts, self.setup.new_tokens)
        return {
            "kind": "run",
            "arm": arm,
            "workload": cell.workload,
            "order": cell.order,
            "repeat": repeat,
            "rows": cell.rows,
            "shared": cell.shared,
            "shape": setup.shape,
            "dtype": setup.dtype,
            "new_tokens": setup.new_tokens,
            "prompt_tokens": sum(map(len, cell.prompts)),
            "unique_tokens": work.prefilled_tokens,
            "work_flop": work.flop(self._model),
            "limit_s": self.limit_s(cell),
        }

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as lines:
            print(json.dumps(line), file=lines, flush=True)
        if line["kind"] == "run":
            took = line["failure"] or f"{line['seconds']:.2f} s"
            print(f"{line['workload']:24} {line['order']:7} {line['arm']:15} {took}", flush=True)
