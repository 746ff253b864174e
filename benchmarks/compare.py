"""Every arm on every workload: `python -m benchmarks.compare` (`make bench-peers` adds the grid).

The same token ids, the same weights, the same dtype; caches cold for each case; one process an arm
and round, one after another. Writes results/cases.jsonl line by line, and the table after each arm.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.arms import ARMS
from benchmarks.prompts import distinct_prompts, shared_prompts, workload_prompts
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.study import Cell, Study
from benchmarks.table import write_results

CASES = ("shared_64", "gsm8k_8shot", "squad_passages", "no_sharing")
DEFAULT_ARMS = ("prefix", "vllm", "vllm_all_cores", "openvino", "generate", "generate_batch")


def make_cell(case: str, setup: Setup) -> Cell:
    """`shared_64`: 64 x (1,024 + 32) random ids; `no_sharing`: 100 random prompts of 100 to 140."""
    if case == "shared_64":
        return Cell(case, shared_prompts(64, 1024, 32, setup.vocabulary_size))
    if case == "no_sharing":
        return Cell(case, distinct_prompts(100, (100, 141), setup.vocabulary_size))
    return Cell(case, workload_prompts(setup.workloads / f"{case}.parquet"))


def orders_of(cell: Cell, arm: str) -> list[Cell]:
    """Sorted as well where that can matter: to a prefix cache, on rows that share in groups."""
    has_groups = cell.workload not in ("shared_64", "no_sharing", "gsm8k_8shot")
    return [cell, cell.presorted()] if has_groups and ARMS[arm].ordered else [cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS)
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"of {CASES}, or other files")
    parser.add_argument("--rows", type=int, help="only the first of each case: a trial")
    parser.add_argument("--given-order-only", action="store_true")
    parser.add_argument("--round", type=int, default=0, help="number of the first round")
    args = parser.parse_args()
    setup = setup_of(args)
    study = Study(setup, setup.results / "cases.jsonl")
    cells = [make_cell(case, setup) for case in args.cases]
    if args.rows:
        cells = [replace(cell, prompts=cell.prompts[: args.rows]) for cell in cells]
    for repeat in range(args.round, args.round + setup.repeats):
        for arm in args.arms:
            all_orders = [ordered for cell in cells for ordered in orders_of(cell, arm)]
            study.measure_machine()
            study.run(arm, cells if args.given_order_only else all_orders, repeat)
            write_results(setup.results)


if __name__ == "__main__":
    main()
