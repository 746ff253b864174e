"""Where sharing begins to pay: `python -m benchmarks.grid`, p shared tokens x G rows below them.

Every row has 32 tokens of its own. One process an arm for all cells, in order of work, with ids of
its own for each cell so that nothing is left over from the one before. Writes grid.jsonl of this
kind of CPU, the table and the break-even plot.
"""

from __future__ import annotations

import argparse

from benchmarks.arms import ARMS
from benchmarks.plot import draw_break_even
from benchmarks.prompts import shared_prompts
from benchmarks.setup import add_options, setup_of
from benchmarks.study import Cell, Study
from benchmarks.table import write_results

_OWN_TOKENS = 32


def make_cells(
    shared: list[int], groups: list[int], most_tokens: int, vocabulary_size: int
) -> list[Cell]:
    """One cell for each (p, G) with p x G up to `most_tokens`."""
    return [
        Cell(
            f"p={p} G={rows}",
            shared_prompts(rows, p, _OWN_TOKENS, vocabulary_size, seed=1_000_003 * p + rows),
            shared=p,
        )
        for p in shared
        for rows in groups
        if p * rows <= most_tokens
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=("prefix", "unshared", "vllm"))
    parser.add_argument("--p", nargs="+", type=int, default=[0, 128, 512, 2048, 8192])
    parser.add_argument("--g", nargs="+", type=int, default=[1, 2, 4, 16, 64, 256])
    parser.add_argument(
        "--most-tokens", type=int, default=2**19, help="leave out cells with p x G above this"
    )
    parser.add_argument(
        "--most-unshared-s", type=float, default=15.0,
        help="leave `unshared` out of cells whose limit without sharing is above this",
    )  # fmt: skip
    args = parser.parse_args()
    setup = setup_of(args)
    study = Study(setup, setup.results / "grid.jsonl")
    cells = make_cells(args.p, args.g, args.most_tokens, setup.vocabulary_size)
    for repeat in range(setup.repeats):
        study.measure_machine()
        cells.sort(key=study.limit_s)
        for arm in args.arms:
            todo = []
            for cell in cells:
                least_s = study.limit_s(cell, share=False)
                if arm == "unshared" and least_s > args.most_unshared_s:
                    study.say(arm, cell, repeat, f"not run: its limit alone is {least_s:.0f} s")
                else:
                    todo.append(cell)
            study.run(arm, todo, repeat)
            write_results(setup.results)
    draw_break_even(setup.results)


if __name__ == "__main__":
    main()
