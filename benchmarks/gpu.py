"""What only a card can tell: `python -m benchmarks.gpu` on a machine with CUDA. JSON lines.

Nobody has run this on a card yet. The rows, by `measure`:

- `device`: name, versions, and bytes/s of a large copy, counted once read and once written
- `layer`: attention of one layer alone, for tiles of 64 and of 128 rows
- `step`: one decode step of the whole model, with CUDA graphs and without, for growing prefixes;
  `floor_s` is the least it can take: weights and live KV, each read once, at the copy's rate
- `job`: all rows from prompts in memory to tokens, ours and transformers' `generate_batch`, each
  alone in its process, after one small warm-up job

Weights are random: what is generated means nothing. Prefixes are KV of random numbers in `layer`
and `step`, where what they hold does not change the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.prompts import Prompts, plan_prompts, shared_prompts
from benchmarks.shapes import SHAPES
from pipeline.engine.base import RunControl
from pipeline.engine.cuda_graphs import DecodeRunner, DecodeStep, choose_recorder
from pipeline.engine.forward import TransformersForward
from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.kernels.triton_kernel import TritonKernel, attend, is_available
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.model.model import LoadedModel
from pipeline.model.shape import ModelShape
from pipeline.settings import EngineSettings

_SHAPES = SHAPES | {
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
_PREFIXES = (1024, 2048, 4096, 8192, 16384)
_CONTEXT = 32_768
_TRIES = 20
_COPIED_BYTES = 1 << 32


@dataclass(frozen=True)
class Workload:
    """`rows` prompts of `shared` tokens in common and `own` of their own, `new` tokens each."""

    rows: int = 256
    shared: int = 2000
    own: int = 128
    new: int = 128

    def prompts(self, vocabulary_size: int) -> Prompts:
        """Random token ids."""
        return shared_prompts(self.rows, self.shared, self.own, vocabulary_size)

    def half_way(self, prefix: int) -> DecodeStep:
        """The step in the middle of the job, below a prefix of so many tokens, in slots from 0."""
        length = self.own + self.new // 2
        rows = np.arange(self.rows)
        low = prefix + rows * length
        own = np.stack([rows, rows + 1, low, low + length, rows * 0 + prefix], 1)
        spans = np.concatenate([[[0, self.rows, 0, prefix, 0]], own])
        return DecodeStep(rows, rows * 0 + prefix + length - 1, low + length - 1, spans)

    def live_tokens(self, prefix: int) -> int:
        """Slots that `half_way` reads."""
        return prefix + self.rows * (self.own + self.new // 2)


def load_random(shape: str, device: torch.device) -> LoadedModel:
    """A Llama in bfloat16 made on the device, with seeded random weights; it never stops."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **_SHAPES[shape], max_position_embeddings=_CONTEXT, bos_token_id=None, eos_token_id=None
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    described = ModelShape(
        family="llama",
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context_length=_CONTEXT,
        vocabulary_size=config.vocab_size,
        dtype="bfloat16",
        generation_config={},
        eos_token_ids=(),
    )
    return LoadedModel(model, described, f"random {shape} Llama")


def median_s(work: Callable[[], object], device: torch.device, tries: int = _TRIES) -> float:
    """Median seconds of `work`, the device idle before and after; three calls to warm up."""
    times = []
    for _ in range(3 + tries):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy on the device."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / median_s(lambda: target.copy_(source), device)


def measure_layer(
    loaded: LoadedModel, workload: Workload, rate: float, prefix: int, tile_rows: int
) -> dict[str, Any]:
    """Attention of one layer, planned once: the kernels alone, without the host's part."""
    shape, device = loaded.shape, loaded.device
    heads = loaded.model.config.num_attention_heads
    step = workload.half_way(prefix)
    arena = _random_cache(loaded, workload.live_tokens(prefix), layers=1).arena[0]
    kernel = TritonKernel(heads, shape.num_kv_heads, device)
    kernel.block_m = tile_rows
    work = kernel.prepare(step.spans, step.positions)
    query = torch.randn(workload.rows, heads, shape.head_dim, device=device).to(arena.dtype)
    rules = AttentionRules(shape.head_dim**-0.5)

    def run() -> None:
        attend(query, arena[0], arena[1], work, rules)

    run()
    record = choose_recorder(device)
    seconds = median_s(record(run) if record else run, device)
    floor = arena.numel() * arena.element_size() / rate
    return {
        "prefix": prefix,
        "tile_rows": tile_rows,
        "seconds": seconds,
        "floor_s": floor,
        "times_floor": seconds / floor,
    }


def measure_step(
    loaded: LoadedModel, workload: Workload, rate: float, prefix: int
) -> dict[str, Any]:
    """One decode step from numpy arrays to numpy token ids, planning included."""
    step = workload.half_way(prefix)
    scratch = workload.live_tokens(prefix)
    cache = _random_cache(loaded, scratch + 1, loaded.shape.num_layers)
    forward, device = TransformersForward(loaded.model, pack_weights=False), loaded.device

    def logits(batch: PackedBatch) -> Tensor:
        return forward(batch, cache, torch.arange(len(batch.slots), device=device))

    heads = loaded.model.config.num_attention_heads
    kernel = TritonKernel(heads, loaded.shape.num_kv_heads, device)
    plain = DecodeRunner(logits, kernel, scratch, None)
    runner = DecodeRunner(logits, kernel, scratch, choose_recorder(device))
    seconds = median_s(lambda: runner(step), device)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    floor = (weights + scratch * cache.bytes_per_token) / rate
    return {
        "prefix": prefix,
        "seconds": seconds,
        "without_graphs_s": median_s(lambda: plain(step), device),
        "same_tokens": runner(step).greedy.token_ids.tolist()
        == plain(step).greedy.token_ids.tolist(),
        "floor_s": floor,
        "times_floor": seconds / floor,
        "plan_s": median_s(lambda: kernel.plan(step.spans, step.positions), device),
        "is_recording": runner.is_recording,
    }


def measure_job(arm: str, loaded: LoadedModel, workload: Workload) -> dict[str, Any]:
    """Seconds from prompts in memory to all tokens there."""
    vocabulary = loaded.shape.vocabulary_size
    engine = PrefixEngine(loaded, EngineSettings(max_rows=workload.rows))

    def run(job: Workload) -> None:
        prompts = job.prompts(vocabulary)
        if arm == "generate_batch":
            _generate_batch(loaded, prompts, job.new)
        else:
            _generate(engine, prompts, vocabulary, job.new)

    run(Workload(rows=8, shared=200, own=16, new=4))
    _wait(loaded.device)
    begin = time.perf_counter()
    run(workload)
    seconds = time.perf_counter() - begin
    result = {"seconds": seconds, "tokens_per_s": workload.rows * workload.new / seconds}
    if arm == "coppice":
        steps = engine.counters.decode_s / (workload.new - 1)
        result |= {"prefill_s": engine.counters.prefill_s, "decode_step_s": steps}
    return result


def _generate(engine: PrefixEngine, prompts: Prompts, vocabulary: int, new: int) -> None:
    plan = plan_prompts(prompts, vocabulary, new)
    for completion in engine.generate(plan, np.arange(len(plan.sequences)), RunControl()):
        if completion.error_type is not None or len(completion.token_ids) != new:
            raise RuntimeError(f"row {completion.sequence}: {completion.error_message}")


def _generate_batch(loaded: LoadedModel, prompts: Prompts, new: int) -> None:
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = loaded.model.generate_batch(prompts, generation_config=greedy).values()
    lengths = [len(o.generated_tokens) for o in outputs]
    if lengths != [new] * len(prompts):
        raise RuntimeError(f"generate_batch gave {sum(lengths)} tokens in {len(lengths)} rows")


def _random_cache(loaded: LoadedModel, capacity: int, layers: int) -> KVCache:
    shape = (layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
    cache = KVCache(shape, capacity, like=next(loaded.model.parameters()))
    cache.arena.normal_()
    return cache


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(measure: str, shape: str, **row: Any) -> None:
    print(json.dumps({"measure": measure, "shape": shape} | row), flush=True)


def _measure_all(shape: str, workload: Workload, prefixes: Iterable[int]) -> None:
    """One shape, its jobs in processes of their own before this one takes the card's memory."""
    for arm in ("coppice", "generate_batch"):
        command = [sys.executable, "-m", "benchmarks.gpu", "--arm", arm, "--shapes", shape]
        for name, value in vars(workload).items():
            command += [f"--{name}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            _say("job", shape, arm=arm, failed=done.stderr.splitlines()[-1:])
        else:
            print(done.stdout.splitlines()[-1], flush=True)
    device = torch.device("cuda")
    rate = copy_rate(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    _say("device", shape, name=torch.cuda.get_device_name(), bytes_per_s=rate, **versions)
    loaded = load_random(shape, device)
    for prefix in prefixes:
        for tile_rows in (64, 128):
            _say("layer", shape, **measure_layer(loaded, workload, rate, prefix, tile_rows))
        _say("step", shape, **measure_step(loaded, workload, rate, prefix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1B", "8B"], choices=sorted(_SHAPES))
    parser.add_argument("--prefixes", nargs="+", type=int, default=_PREFIXES)
    parser.add_argument("--arm", choices=["coppice", "generate_batch"], help="one job, no more")
    for name, value in vars(Workload()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if not is_available():
        sys.exit("benchmarks.gpu measures CUDA devices; this machine has none, or no triton.")
    workload = Workload(args.rows, args.shared, args.own, args.new)
    for shape in args.shapes:
        if args.arm:
            loaded = load_random(shape, torch.device("cuda"))
            _say("job", shape, arm=args.arm, **measure_job(args.arm, loaded, workload))
        else:
            _measure_all(shape, workload, args.prefixes)


if __name__ == "__main__":
    main()
