"""Where the time of a job goes, operator by operator: `python -m benchmarks.profile_job [CASE]`.

CASE as in `benchmarks.cases`. One run unmeasured, one under torch's profiler; products by their
weight's shape with the rate that they reach, attention with its rate over the work counted, each
apart for prefill (forwards of more tokens than rows decode together) and decode.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES, make_cell
from benchmarks.limit import Dimensions, count_work, gemm_rates
from benchmarks.prompts import plan_prompts
from benchmarks.setup import add_options, setup_of
from benchmarks.shapes import SHAPES
from pipeline.engine.base import RunControl
from pipeline.engine.load import make_engine
from pipeline.settings import JobSettings

_KINDS = ("bfloat16", "half", "widened", "float32", "int8")
_BLOCKED = tuple(f"coppice::{kind}_linear" for kind in _KINDS)  # weights [B, K / n, 64, n]
_PACKED = "mkldnn::_linear_pointwise"  # weight [outputs, K]
_ATTENTION = "coppice::cascade_attention"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("case", nargs="?", default=CASES[0])
    setup = setup_of(args := parser.parse_args())
    cell = make_cell(args.case, setup)
    flat = {"model": setup.model(), "dtype": setup.dtype, "device": "cpu", "ignore_eos": True}
    settings = JobSettings.from_flat(flat)
    engine = make_engine(settings)
    plan = plan_prompts(cell.prompts, setup.vocabulary_size, setup.new_tokens)
    everything = np.arange(len(plan.sequences))
    list(engine.generate(plan, everything, RunControl()))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        list(engine.generate(plan, everything, RunControl()))
    counters = engine.counters
    seconds, calls, flop = Counter[str](), Counter[str](), Counter[str]()
    for event in profiler.events():
        if event.cpu_parent is not None or event.name.startswith("aten::empty"):
            continue
        name = event.name
        if name.startswith((*_BLOCKED, _PACKED, _ATTENTION)):
            tokens = event.input_shapes[0][0]
            phase = "prefill" if tokens > settings.engine.max_rows else "decode"
            name = f"{phase} {name.split('::')[1].removeprefix('_')}"
        if event.name.startswith((*_BLOCKED, _PACKED)):
            outputs, depth = weight_of(event.name, event.input_shapes)
            name += f" {outputs} x {depth}"
            flop[name] += 2 * tokens * outputs * depth
        seconds[name] += event.cpu_time_total / 1e6
        calls[name] += 1
    model = Dimensions.of(SHAPES[setup.shape])
    best = max(gemm_rates(model, getattr(torch, setup.dtype)).values())
    work = count_work(cell.prompts, setup.new_tokens)
    attention = sum(s for name, s in seconds.items() if "cascade_attention" in name)
    print(f"prefill {counters.prefill_s:.2f} s, decode {counters.decode_s:.2f} s; best product")
    print(f"{best / 1e9:.0f} GFLOP/s, so the limit is {work.flop(model) / best:.2f} s")
    for name, spent in seconds.most_common(16):
        speed = f"{flop[name] / spent / 1e9:6.0f} GFLOP/s" if flop[name] else ""
        print(f"{name:44} {spent:7.3f} s {calls[name]:7,} calls {speed}")
    rate = model.flop_per_pair * work.pairs / attention / 1e9 if attention else 0.0
    print(f"attention over the pairs counted: {rate:.0f} GFLOP/s")


def weight_of(operator: str, shapes: list[list[int]]) -> tuple[int, int]:
    """Outputs and inputs of a layer, from the shapes of what its operator is given."""
    if operator in _BLOCKED:
        blocks, deep, wide, together = shapes[1]
        return blocks * wide, deep * together
    tokens = shapes[0][0]
    outputs, depth = next(s for s in shapes[1:] if len(s) == 2 and s != [tokens, s[1]])
    return outputs, depth


if __name__ == "__main__":
    main()
