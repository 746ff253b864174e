"""Every arm on every workload: `python -m benchmarks.compare` (`make bench-peers` adds the grid).

The same token ids, the same weights, the same dtype; caches cold for each case; one process an arm
and round, one after another. Writes cases.jsonl of this kind of CPU line by line, and the table
after each arm; with `--neighbours`, beside.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.arms import ARMS
from benchmarks.cases import CASES, has_groups, make_cell
from benchmarks.neighbours import neighbours
from benchmarks.setup import add_options, setup_of
from benchmarks.study import Cell, Study
from benchmarks.table import write_results

DEFAULT_ARMS = ("prefix", "vllm", "vllm_all_cores", "openvino", "generate", "generate_batch")


def orders_of(cell: Cell, arm: str) -> list[Cell]:
    """Sorted as well where that can matter: to a prefix cache, on rows that share in groups."""
    is_sorted = has_groups(cell.workload) and ARMS[arm].ordered
    return [cell, cell.presorted()] if is_sorted else [cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS)
    parser.add_argument("--once", nargs="*", choices=ARMS, default=(), help="arms of one round")
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"of {CASES}, or other files")
    parser.add_argument("--rows", type=int, help="only the first of each case: a trial")
    parser.add_argument("--given-order-only", action="store_true")
    parser.add_argument("--round", type=int, default=0, help="number of the first round")
    parser.add_argument("--neighbours", type=int, default=0, help="processes that never sleep")
    args = parser.parse_args()
    setup = setup_of(args)
    study = Study(setup, setup.results / ("beside.jsonl" if args.neighbours else "cases.jsonl"))
    cells = [make_cell(case, setup) for case in args.cases]
    if args.rows:
        cells = [replace(cell, prompts=cell.prompts[: args.rows]) for cell in cells]
    for repeat in range(args.round, args.round + setup.repeats):
        for arm in (*args.arms, *(() if repeat > args.round else args.once)):
            all_orders = [ordered for cell in cells for ordered in orders_of(cell, arm)]
            study.measure_machine()
            with neighbours(args.neighbours):
                study.run(arm, cells if args.given_order_only else all_orders, repeat)
            write_results(setup.results)


if __name__ == "__main__":
    main()
