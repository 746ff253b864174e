"""What there is, and the most that the card does: a copy, a large product, those of a step."""

from __future__ import annotations

import subprocess
from functools import partial

import numpy as np
import torch
import transformers
import triton
from torch.nn.functional import linear

from benchmarks.gpu.child import Bench
from benchmarks.gpu.roofline import H100, Card, Part
from benchmarks.gpu.timing import rotation, seconds_a_call
from benchmarks.gpu.workload import GPU_SHAPES
from benchmarks.limit import Dimensions

_ROWS = 256
_CARD: list[Card] = []


def environment(bench: Bench, argument: str) -> None:
    """Versions, and which card."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, triton, np)}
    bench.say(versions=versions)
    if bench.device.type != "cuda":
        return
    card = torch.cuda.get_device_properties(bench.device)
    bench.say(
        name=card.name,
        processors=card.multi_processor_count,
        l2_bytes=card.L2_cache_size,
        memory_bytes=card.total_memory,
        capability=torch.cuda.get_device_capability(),
    )
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,ecc.mode.current"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    bench.say(nvidia_smi=said.splitlines())


def ceilings(bench: Bench, argument: str) -> None:
    """The card's rates, then every matrix product of a step of 256 rows, merged and not."""
    card = measure_card(bench)
    bench.say(copy_bytes_per_s=card.bytes_per_s, bf16_flop_per_s=card.flop_per_s)
    if bench.is_dry:
        return
    for name in ("1B", "8B"):
        model = Dimensions.of(GPU_SHAPES[name])
        kv = model.hidden // model.heads * model.kv_heads
        sizes = {
            "q, o": (model.hidden, model.hidden),
            "k, v": (model.hidden, kv),
            "q k v merged": (model.hidden, model.hidden + 2 * kv),
            "gate, up": (model.hidden, model.intermediate),
            "gate up merged": (model.hidden, 2 * model.intermediate),
            "down": (model.intermediate, model.hidden),
            "head": (model.hidden, model.vocabulary),
        }
        for product, (width, out) in sizes.items():
            _product(bench, card, f"{name} {product}", width, out)


def _product(bench: Bench, card: Card, name: str, width: int, out: int) -> None:
    weights = [
        torch.randn(out, width, device=bench.device, dtype=torch.bfloat16)
        for _ in range(rotation(2 * out * width, bench.device))
    ]
    rows = torch.randn(_ROWS, width, device=bench.device, dtype=torch.bfloat16)
    seconds = seconds_a_call([partial(linear, rows, w) for w in weights], bench.device)
    part = Part(2 * (out * width + _ROWS * (out + width)), 2 * _ROWS * out * width)
    floor = part.floor_s(card)
    bench.say(product=name, us=seconds * 1e6, floor_us=floor * 1e6, times_floor=seconds / floor)
    del weights
    bench.free()


def measure_card(bench: Bench) -> Card:
    """Rates of this card, measured once in a process, on random data: zeros draw less power."""
    if not _CARD:
        _CARD.append(_measure(bench))
    return _CARD[0]


def _measure(bench: Bench) -> Card:
    card = Card(_copy_rate(bench), _product_rate(bench), H100.start_s)
    bench.free()
    return card


def _copy_rate(bench: Bench) -> float:
    size = 1 << (20 if bench.is_dry else 30)
    source = torch.empty(size, dtype=torch.int32, device=bench.device).random_()
    target = torch.empty_like(source)
    copy_s = seconds_a_call([lambda: target.copy_(source)], bench.device)
    return 2 * source.nbytes / copy_s


def _product_rate(bench: Bench) -> float:
    side = 256 if bench.is_dry else 8192
    x = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    return 2 * side**3 / seconds_a_call([lambda: x @ x], bench.device)
