"""One layer: the steps around attention, ours and torch's; attention, ours whole and by launch, and
torch's own flash attention beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.around import Sizes, measure
from benchmarks.gpu.ceilings import measure_card
from benchmarks.gpu.child import Bench
from benchmarks.gpu.roofline import Card, Rows, attention, unshared_attention
from benchmarks.gpu.timing import Call, rotation, seconds_a_call
from benchmarks.gpu.workload import (
    DRY_PREFIXES,
    DRY_WORKLOAD,
    PREFIXES,
    WORKLOAD,
    Workload,
)
from benchmarks.limit import Dimensions
from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.kernels.triton_kernel import DeviceWork, Launches, TritonKernel
from pipeline.model.model import LoadedModel

_TILES = (64, 128)
_MOST_UNSHARED_BYTES = 12 << 30


class Setting(NamedTuple):
    """One layer's sizes in a step; `dimensions` those of the whole model."""

    dimensions: Dimensions
    rows: Rows
    dtype: torch.dtype
    device: torch.device

    @property
    def head_dim(self) -> int:
        return self.dimensions.hidden // self.dimensions.heads

    def kv(self, tokens: int, *, by_head: bool) -> Tensor:
        """Random keys and values [2, heads, tokens, d], or [2, tokens, heads, d]."""
        shape = (
            (self.dimensions.kv_heads, tokens) if by_head else (tokens, self.dimensions.kv_heads)
        )
        return torch.randn(2, *shape, self.head_dim, device=self.device, dtype=self.dtype)

    def query(self) -> Tensor:
        shape = (self.rows.rows, self.dimensions.heads, self.head_dim)
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def layer(bench: Bench, shape: str) -> None:
    """For growing prefixes; microseconds beside what the card must take at least."""
    loaded, card = bench.model(shape), measure_card(bench)
    workload = DRY_WORKLOAD if bench.is_dry else WORKLOAD
    with torch.inference_mode():
        sizes = Sizes.of(Dimensions.of(loaded.model.config.to_dict()), loaded.model.dtype)
        bench.say(**measure(sizes, workload.rows, card, bench.device))
        bench.free()
        for prefix in DRY_PREFIXES if bench.is_dry else PREFIXES:
            if bench.left_s < 30:
                bench.say(prefix=prefix, skipped="no time is left")
                return
            setting = setting_of(loaded, workload, prefix)
            row = floors(setting, card)
            row |= _ours(setting, workload, prefix)
            if not bench.is_dry:
                row |= _flash(setting)
            if "ours_us" in row:
                row["times_floor"] = row["ours_us"] / row["floor_us"]
            bench.say(prefix=prefix, **row)
            bench.free()


def setting_of(loaded: LoadedModel, workload: Workload, prefix: int) -> Setting:
    """The layer of a step of this workload."""
    dimensions = Dimensions.of(loaded.model.config.to_dict())
    rows = Rows(workload.rows, prefix, workload.own_half_way)
    return Setting(dimensions, rows, loaded.model.dtype, loaded.device)


def floors(setting: Setting, card: Card) -> dict[str, Any]:
    """Microseconds that the card must take: for the prefix, for the rows' own, without sharing."""
    shared, own = attention(setting.dimensions, setting.rows)
    alone = unshared_attention(setting.dimensions, setting.rows)
    return {
        "floor_us": 1e6 * (shared.floor_s(card) + own.floor_s(card)),
        "byte_floor_us": 1e6 * (shared.bytes + own.bytes) / card.bytes_per_s,
        "flop_floor_us": 1e6 * (shared.flop + own.flop) / card.flop_per_s,
        "unshared_floor_us": 1e6 * alone.floor_s(card),
    }


def _ours(setting: Setting, workload: Workload, prefix: int) -> dict[str, Any]:
    rows, device = setting.rows, setting.device
    step = workload.half_way(prefix)
    live = workload.live_tokens(prefix)
    bytes_each = 4 * live * setting.dimensions.kv_heads * setting.head_dim
    arenas = [setting.kv(live, by_head=True) for _ in range(rotation(bytes_each, device))]
    query, rules = setting.query(), AttentionRules(setting.head_dim**-0.5)
    row: dict[str, Any] = {"rows": rows.rows, "own": rows.own}
    for tile in _TILES:
        kernel = TritonKernel(setting.dimensions.heads, setting.dimensions.kv_heads, device)
        kernel.block_m = tile
        work = kernel.prepare(step.spans, step.positions)
        launches = [Launches.of(query, (arena[0], arena[1]), work, rules) for arena in arenas]
        parts: dict[str, list[Call]] = {
            "": [x.run for x in launches],
            "_prefix": [x.attend_large for x in launches],
            "_own": [x.attend_small for x in launches],
            "_merge": [x.merge for x in launches],
        }
        if device.type == "cuda":
            side = torch.cuda.Stream(device)
            parts["_overlapped"] = [partial(_run_overlapped, x, side) for x in launches]
        name = "ours" if tile == _TILES[0] else f"tile{tile}"
        for part, calls in parts.items():
            row[f"{name}{part}_us"] = 1e6 * seconds_a_call(calls, device)
        row[f"{name}_items"] = _describe(work)
    return row


def _run_overlapped(launches: Launches, side: torch.cuda.Stream) -> None:
    """Prefix and own keys at a time: one is bound by arithmetic, the other by bytes."""
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        launches.attend_small()
    launches.attend_large()
    main.wait_stream(side)
    launches.merge()


def _describe(work: DeviceWork) -> str:
    shape = work.shape
    return f"{shape.large} large, {shape.small} small, {shape.partials} partials"


def _flash(setting: Setting) -> dict[str, Any]:
    """torch's FlashAttention 2: prefix once and rows apart, joined; and every row by itself."""
    try:
        row = _flash_cascade(setting)
        if unshared_attention(setting.dimensions, setting.rows).bytes < _MOST_UNSHARED_BYTES:
            row |= _flash_unshared(setting)
    except Exception as error:  # it is private to torch, and changes
        return {"flash_failed": f"{type(error).__name__}: {str(error)[:200]}"}
    return row


def _flash_cascade(setting: Setting) -> dict[str, Any]:
    rows, query = setting.rows, setting.query()
    shared = [setting.kv(rows.shared, by_head=False) for _ in range(4)]
    own = [setting.kv(rows.rows * rows.own, by_head=False) for _ in range(4)]
    of_all, of_prefix = _bounds(setting, 1, rows.rows), _bounds(setting, 1, rows.shared)
    of_each, of_own = _bounds(setting, rows.rows, 1), _bounds(setting, rows.rows, rows.own)

    def prefix(i: int) -> tuple[Tensor, Tensor]:
        return _attend(query, shared[i], (of_all, of_prefix), (rows.rows, rows.shared))

    def suffix(i: int) -> tuple[Tensor, Tensor]:
        return _attend(query, own[i], (of_each, of_own), (1, rows.own))

    def cascade(i: int) -> Tensor:
        (one, one_lse), (two, two_lse) = prefix(i), suffix(i)
        return two + (one - two) * torch.sigmoid(one_lse - two_lse).t().unsqueeze(-1)

    works: dict[str, Callable[[int], object]] = {
        "flash_prefix_us": prefix, "flash_own_us": suffix, "flash_cascade_us": cascade,
    }  # fmt: skip
    return {
        name: 1e6 * seconds_a_call([partial(work, i) for i in range(4)], setting.device)
        for name, work in works.items()
    }


def _flash_unshared(setting: Setting) -> dict[str, Any]:
    rows, query = setting.rows, setting.query()
    length = rows.shared + rows.own
    keys = setting.kv(rows.rows * length, by_head=False)
    bounds = _bounds(setting, rows.rows, 1), _bounds(setting, rows.rows, length)
    call: Call = lambda: _attend(query, keys, bounds, (1, length))  # noqa: E731
    return {"flash_unshared_us": 1e6 * seconds_a_call([call], setting.device)}


def _bounds(setting: Setting, count: int, length: int) -> Tensor:
    return torch.arange(count + 1, device=setting.device, dtype=torch.int32) * length


def _attend(
    query: Tensor, kv: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [heads, rows])"""
    flash = torch.ops.aten._flash_attention_forward
    out, lse = flash(query, kv[0], kv[1], *bounds, *longest, 0.0, False, False)[:2]
    return out, lse
