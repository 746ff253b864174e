"""How even shards are: `python -m benchmarks.shard_balance`, every workload file, 2 to 64 shards.

Prints the largest predicted cost over the mean, and what all shards compute over what one machine
would: the price of cutting a group.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.prompts import workload_prompts
from benchmarks.scratch import ROOT
from pipeline.plan.plan import build_plan
from pipeline.plan.shards import cut_into_shards
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    workloads = ROOT.parent / "shared" / "workloads"
    parser.add_argument("--workloads", type=Path, default=workloads)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 3, 4, 8, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    for path in sorted(args.workloads.glob("*.parquet")):
        if "messages" in path.name:
            continue  # the same conversations as mt_bench
        prompts = workload_prompts(path)
        names = [str(row) for row in range(len(prompts))]
        params = (SamplingParams(args.new_tokens),)
        table = TokenTable.from_lists(prompts, 2**16)
        plan = build_plan(table, names, params, np.zeros(len(prompts), np.int64))
        whole = plan.tree.unique_tokens + int(plan.max_new_tokens.sum())
        for number in args.shards:
            costs = np.array([shard.cost for shard in cut_into_shards(plan, number)])
            print(
                f"{path.stem:16} {number:3} shards: largest {costs.max() / costs.mean():.3f} of "
                f"the mean, all together {costs.sum() / whole:.3f} of one machine"
            )


if __name__ == "__main__":
    main()
