"""How much of the tokenizer's own speed planning keeps: `python -m benchmarks.tokenise_rate FILE`.

In turn: `tokenizers.encode_batch` on the texts in memory, and what a plan does until all token ids
are in their file, that is reading Parquet, tokenising, filing. The median of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import polars as pl
from tokenizers import Tokenizer

from benchmarks.scratch import ROOT, scratch
from pipeline.job.job import open_job
from pipeline.job.reading import read_rows
from pipeline.settings import JobSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    workloads = ROOT.parent / "shared" / "workloads"
    parser.add_argument("file", type=Path, nargs="?", default=workloads / "squad_passages.parquet")
    parser.add_argument("--tokenizer", type=Path, default=workloads / "tokenizer.json")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = scratch("tokenise")
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_bytes(args.tokenizer.read_bytes())
    texts = pl.read_parquet(args.file)["prompt"].to_list()
    texts = (texts * (args.rows // len(texts) + 1))[: args.rows]
    source = model / "prompts.parquet"
    pl.DataFrame({"id": [str(i) for i in range(len(texts))], "prompt": texts}).write_parquet(source)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    settings = JobSettings.from_flat({"model": str(model), "engine": "echo"})
    ratios = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        tokens = sum(len(e) for e in tokenizer.encode_batch(texts))
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        table = read_rows(open_job(str(source), settings)).tokens()
        filed = time.perf_counter() - begin
        assert int(table.lengths.sum()) == tokens
        ratios.append(alone / filed)
        print(f"{tokens:,} tokens: alone {alone:.2f} s, filed {filed:.2f} s, {ratios[-1]:.2f}")
    print(f"median {statistics.median(ratios):.2f} of encode_batch's rate")


if __name__ == "__main__":
    main()
