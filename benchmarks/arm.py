"""One engine on one job, alone in its process; prints one JSON line. Called by `main_job`.

`seconds` runs from "prompts and weights are in memory" to "all tokens are there": cold, no warm-up,
no result kept from before. Arms: `prefix` (ours), `naive` (plain `generate`, one prompt after the
other), `generate` (transformers `generate` given all prompts as one batch).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

import numpy as np
import torch

from benchmarks.shapes import load_random, plan_prompts, shared_prompts
from pipeline.engine.base import Engine, RunControl
from pipeline.engine.model import LoadedModel
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.settings import EngineSettings


def run_engine(
    engine: Engine, prompts: list[list[int]], vocabulary: int, new: int
) -> list[list[int]]:
    """Token ids by row."""
    plan = plan_prompts(prompts, vocabulary, new)
    done = engine.generate(plan, np.arange(len(plan.sequences)), RunControl())
    answers = {c.sequence: list(c.token_ids) for c in done}
    return [answers[s] for s in plan.sequence_of_row.tolist()]


def run_generate(loaded: LoadedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers `generate`, all prompts (of one length) in one batch."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
    return [row.tolist() for row in output[:, ids.shape[1] :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=["prefix", "naive", "generate"])
    parser.add_argument("--shape", default="135M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shared", type=int, default=1024)
    parser.add_argument("--own", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--kv-budget", default=None)
    args = parser.parse_args()
    loaded = load_random(args.shape, args.dtype)
    vocabulary = loaded.shape.vocabulary_size
    prompts = shared_prompts(args.rows, args.shared, args.own, vocabulary)
    counters = None
    begin = time.perf_counter()
    if args.arm == "generate":
        token_ids = run_generate(loaded, prompts, args.new)
    else:
        engine: Engine = NaiveEngine(loaded)
        if args.arm == "prefix":
            engine = PrefixEngine(loaded, EngineSettings(kv_budget=args.kv_budget))
        token_ids = run_engine(engine, prompts, vocabulary, args.new)
        counters = dataclasses.asdict(engine.counters)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "token_ids": token_ids, "counters": counters}))


if __name__ == "__main__":
    main()
