"""The files of a comparison by name: made up with a known amount of sharing, or real prompts."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.prompts import (
    Prompts,
    distinct_prompts,
    growing_prompts,
    layered_prompts,
    shared_prompts,
    workload_prompts,
)
from benchmarks.setup import Setup
from benchmarks.study import Cell

_MADE_UP: dict[str, Callable[[int], Prompts]] = {
    # 64 x (1,024 + 32)
    "shared_64": lambda v: shared_prompts(64, 1024, 32, v),
    # one preamble, examples of 27 tasks: 950 tokens, 89 % of them shared
    "worked_examples": lambda v: layered_prompts(150, [(1, 573), (27, 337), (150, 40)], v),
    # questions about 15 tables: 700 tokens, 90 %
    "tables": lambda v: layered_prompts(200, [(15, 680), (200, 20)], v),
    # questions about 8 documents: 3,500 tokens, 79 %
    "long_documents": lambda v: layered_prompts(40, [(8, 3470), (40, 30)], v),
    # 3 conversations of 40 turns, all of the history sent again: 818 tokens, 95 %
    "histories": lambda v: growing_prompts(3, 40, (80, 36), v),
    "short_instructions": lambda v: distinct_prompts(120, (60, 121), v, seed=1),
    "no_sharing": lambda v: distinct_prompts(100, (100, 141), v),
}
CASES = (*_MADE_UP, "gsm8k_8shot", "squad_passages")
_IN_NO_GROUPS = ("shared_64", "short_instructions", "no_sharing", "gsm8k_8shot")


def make_cell(case: str, setup: Setup) -> Cell:
    """The case of that name, else a workload file of it."""
    make = _MADE_UP.get(case)
    if make is not None:
        return Cell(case, make(setup.vocabulary_size))
    return Cell(case, workload_prompts(setup.workloads / f"{case}.parquet"))


def has_groups(case: str) -> bool:
    """Whether rows share in groups, so that their order can matter to a prefix cache."""
    return case not in _IN_NO_GROUPS
