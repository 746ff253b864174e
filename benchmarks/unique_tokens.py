"""Is U right: `python -m benchmarks.unique_tokens`, every workload file, needs the dev packages.

Plans each file as `coppice plan` does and counts its distinct prefixes again in a trie of plain
dictionaries, from texts and ids that nothing of coppice has touched. Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.prompts import workload_prompts
from benchmarks.scratch import ROOT
from pipeline.job.job import open_job
from pipeline.job.planning import plan_rows
from pipeline.settings import JobSettings
from tests.plan.trie_oracle import count_tokens

WORKLOADS = ROOT.parent / "shared" / "workloads"


class Counted(NamedTuple):
    """Tokens of all prompts, and distinct ones, by the plan and by the trie."""

    planned: tuple[int, int]
    oracle: tuple[int, int]


def count(path: Path) -> Counted:
    """Both counts of a workload file, whose tokenizer lies beside it."""
    with TemporaryDirectory() as folder:
        shutil.copy(path.parent / "tokenizer.json", folder)
        flat = {"model": folder, "engine": "echo"}
        planned = plan_rows(open_job(str(path), JobSettings.from_flat(flat))).count_tokens()
    prompts = workload_prompts(path)
    return Counted(planned, (sum(map(len, prompts)), count_tokens(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", type=Path, default=WORKLOADS)
    args = parser.parse_args()
    is_right = True
    for path in sorted(args.workloads.glob("*.parquet")):
        (total, unique), oracle = count(path)
        is_right &= (total, unique) == oracle
        print(f"{path.stem:18} T {total:9,}  U {unique:9,}  a trie of dictionaries: {oracle[1]:9,}")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
