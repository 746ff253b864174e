"""Documents at any position against prefixes: `python -m benchmarks.segments`. Last line: JSON.

The table is questions over squad_passages, each with its best passages by BM25, in random order
(`benchmarks.rag`). Ways take turns in one process, encoding included; tokens computed stand beside
the plan's. Then a table in which no document comes twice, and with `--beside` others on the whole
prompts of the first one, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.job import Job
from benchmarks.launcher import must_run
from benchmarks.rag import Rows, plan_table, squad_table
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.shapes import load_random
from benchmarks.strict import seconds
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.soft_rows import add_soft_rows
from pipeline.plan.document_order import best_order
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan
from pipeline.settings import EngineSettings

_PACKET_TOKENS = 8


@dataclass(frozen=True)
class Way:
    """How a table is computed: a plan for the one engine."""

    name: str
    plan: Plan

    @property
    def planned(self) -> int:
        """Tokens that the plan says are to be computed."""
        return self.plan.tokens_to_compute(np.arange(len(self.plan.sequences)))


def in_best_order(rows: Rows) -> Rows:
    """The documents of each row in the order in which prefixes share most of them."""
    numbers: dict[tuple[int, ...], int] = {}
    documents = [
        [numbers.setdefault(tuple(ids), len(numbers)) for ids in row[1:-1]] for row in rows
    ]
    ids = [list(known) for known in numbers]
    order = best_order(documents, [len(known) for known in ids], [0] * len(rows))
    return [
        [row[0], *(ids[n] for n in best), row[-1]] for row, best in zip(rows, order, strict=True)
    ]


def distinct_table(rows: int, vocabulary_size: int, documents: int = 5, tokens: int = 150) -> Rows:
    """Random ids; nothing but the preamble comes twice."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return draw.integers(0, vocabulary_size, length).tolist()

    preamble = ids(50)
    return [[preamble, *(ids(tokens) for _ in range(documents)), ids(20)] for _ in range(rows)]


def measure(engine: PrefixEngine, ways: list[Way], repeats: int) -> dict[str, Any]:
    """Medians of rounds in which every way has its turn, the order changing."""
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for turn in range(repeats):
        for way in ways if turn % 2 == 0 else ways[::-1]:
            taken, _ = seconds(engine, way.plan)
            counters = engine.counters
            assert counters.prefilled_tokens == way.planned, way.name
            found[way.name].append({
                "seconds": taken,
                "prefill_s": counters.prefill_s,
                "decode_s": counters.decode_s,
                "peak_kv_mb": counters.peak_kv_bytes / 1e6,
            })  # fmt: skip
            print(f"{way.name:12} {way.planned:9} tokens {taken:7.2f} s", flush=True)
    report = {}
    for way in ways:
        rounds = found[way.name]
        report[way.name] = {
            "tokens": way.planned,
            "rows_per_s": len(way.plan.table) / statistics.median(r["seconds"] for r in rounds),
            **{name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
        }
    return report


def beside(names: list[str], rows: Rows, setup: Setup) -> dict[str, dict[str, float]]:
    """Seconds of other engines, which know no documents."""
    prompts = [[token_id for part in row for token_id in part] for row in rows]
    job = Job(setup.model(), setup.dtype, setup.new_tokens, [prompts])
    report = {}
    for name in names:
        taken = must_run(name, job, setup.time_limit_s)["seconds"]
        print(f"{name:12} {taken:27.2f} s", flush=True)
        report[name] = {"seconds": taken, "rows_per_s": len(rows) / taken}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.set_defaults(repeats=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--passages", type=int, default=5, help="a row")
    parser.add_argument(
        "--ways", nargs="+", help="of the first table: prefix best concat epic packet"
    )
    parser.add_argument("--beside", nargs="*", default=[], help="engines: vllm vllm_all_cores")
    setup = setup_of(args := parser.parse_args())
    size, new = setup.vocabulary_size, setup.new_tokens
    loaded = load_random(setup.shape, setup.dtype)
    hidden = loaded.model.get_input_embeddings().weight.shape[1]
    soft = np.random.default_rng(0).normal(0, 0.02, (2 * _PACKET_TOKENS, hidden))
    add_soft_rows(loaded.model, soft.astype(np.float32), size)
    engine = PrefixEngine(loaded, EngineSettings())
    rows = squad_table(setup.workloads / "squad_passages.parquet", args.passages, args.rows)
    table = [
        Way("prefix", plan_table(rows, size, new, None)),
        Way("best", plan_table(in_best_order(rows), size, new, None)),
        Way("concat", plan_table(rows, size, new, Reuse("concat", size))),
        Way("epic", plan_table(rows, size, new, Reuse("epic", size, True, 8))),
        Way("packet", plan_table(rows, size, new, Reuse("packet", size, False, 0, _PACKET_TOKENS))),
    ]
    once = distinct_table(max(8, args.rows // 10), size)
    apart = [
        Way("prefix", plan_table(once, size, new, None)),
        Way("concat", plan_table(once, size, new, Reuse("concat", size))),
    ]
    seconds(engine, plan_table(rows[:4], size, 2, Reuse("concat", size)))
    report: dict[str, Any] = {"shape": setup.shape, "dtype": setup.dtype, "rows": args.rows}
    report["prompt_tokens"] = int(table[0].plan.table.lengths.sum())
    chosen = [way for way in table if not args.ways or way.name in args.ways]
    report["table"] = measure(engine, chosen, setup.repeats)
    report["nothing repeats"] = measure(engine, apart, setup.repeats)
    report["beside"] = beside(args.beside, rows, setup)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
