"""Cascade attention on a GPU: starts the Triton programs over work items. Knows no prompts.

Every launch takes its size from the shape of the work, never from its contents, and the host reads
nothing back, so that a step can be recorded into a CUDA graph. Imports without triton. Under
`TRITON_INTERPRET=1`, set before triton is first imported, the programs run on the CPU, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import AttentionRules, KVSpans
from pipeline.engine.kernels.work_items import (
    ITEM_FIELDS,
    SMALL_ROWS,
    WorkItems,
    WorkShape,
    choose_split_keys,
    plan_work,
)

_TILE_ROWS = 64
_PROGRAMS_A_PROCESSOR = 4  # so that none waits long for the last one
_KEY_BLOCK_BYTES = 1 << 14  # K and V of two blocks in flight fit every card's shared memory
_WARP_TILE_BYTES = 1 << 14  # queries of a tile above which four warps run out of registers
_FLOAT32_WARP_BYTES = 1 << 11  # queries for each warp, by which no variant spills
_MERGED_AT_ONCE = 8


def is_available(device_type: str = "cuda") -> bool:
    """Whether the programs can run on tensors of such a device."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return device_type == "cpu"
    return device_type == "cuda" and torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """`WorkItems` on the device: views of one int64 vector, see `WorkItems.flatten`."""

    shape: WorkShape
    block_m: int
    rep: int
    large: Tensor
    small: Tensor
    offsets: Tensor
    partials: Tensor
    positions: Tensor

    @classmethod
    def view(cls, flat: Tensor, shape: WorkShape, block_m: int, rep: int) -> DeviceWork:
        """The parts of `flat`; what is later written into it is what they say."""
        large, small, *rest = torch.split(flat, list(shape.lengths))
        items = large.view(-1, ITEM_FIELDS), small.view(-1, ITEM_FIELDS)
        return cls(shape, block_m, rep, *items, *rest)


class TritonKernel:
    """See `AttentionKernel`."""

    name = "triton"

    def __init__(self, num_heads: int, num_kv_heads: int, device: torch.device) -> None:
        self.device = device
        self.rep = num_heads // num_kv_heads
        self.block_m = max(_TILE_ROWS, 1 << (self.rep - 1).bit_length())
        self._num_kv_heads = num_kv_heads
        self._programs = _PROGRAMS_A_PROCESSOR * _num_processors(device)
        self.items_aimed_at = -(-self._programs // num_kv_heads)

    def plan(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> WorkItems:
        """The work of one forward, still on the host."""
        keys = choose_split_keys(spans, self.rep, self.block_m, self._num_kv_heads, self._programs)
        return plan_work(spans, positions, self.rep, self.block_m, keys, owner)

    def prepare(
        self,
        spans: KVSpans,
        positions: NDArray[np.int64],
        owner: NDArray[np.int64] | None = None,
    ) -> DeviceWork:
        """The work of one forward, on the device."""
        return upload(self.plan(spans, positions, owner), self.device)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: DeviceWork, rules: AttentionRules
    ) -> Tensor:
        return attend(query, keys, values, work, rules)


def upload(work: WorkItems, device: torch.device) -> DeviceWork:
    flat = torch.from_numpy(work.flatten(work.shape)).to(device)
    return DeviceWork.view(flat, work.shape, work.block_m, work.rep)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, work: DeviceWork, rules: AttentionRules
) -> Tensor:
    """One layer. query [V, Hq, d]; keys, values [Hkv, capacity, d] -> [N, Hq, d], query's dtype.

    Any strides where the numbers of one head lie side by side. Partial results live only in this
    call: torch's allocator gives the same memory to the next layer.
    """
    return Launches.of(query, (keys, values), work, rules).run()


@dataclass(frozen=True, slots=True)
class Launches:
    """What is started for one layer, one program after another; and where each leaves its part."""

    query: Tensor
    keys: Tensor
    values: Tensor
    work: DeviceWork
    rules: AttentionRules
    part_out: Tensor
    part_lse: Tensor
    out: Tensor

    @classmethod
    def of(
        cls, query: Tensor, kv: tuple[Tensor, Tensor], work: DeviceWork, rules: AttentionRules
    ) -> Launches:
        keys, values = kv
        queries, heads, head_dim = query.shape
        kv_heads, shape = keys.shape[0], work.shape
        assert queries == shape.queries, f"{queries} queries, {shape.queries} planned"
        assert heads == kv_heads * work.rep, f"{heads} of {kv_heads}, {work.rep} a group planned"
        assert query.stride(2) == keys.stride(2) == values.stride(2) == 1, "a head is in pieces"
        assert rules.scale > 0, "the program scales after it has taken the maximum"
        part_out = query.new_empty((shape.partials, heads, head_dim), dtype=torch.float32)
        part_lse = query.new_empty((shape.partials, heads), dtype=torch.float32)
        out = query.new_empty((shape.tokens, heads, head_dim))
        return cls(query, keys, values, work, rules, part_out, part_lse, out)

    def run(self) -> Tensor:
        """[N, Hq, d]"""
        self.attend_large()
        self.attend_small()
        return self.merge()

    def attend_large(self) -> None:
        """Shared spans, for tiles of rows."""
        self._attend(self.work.large, self.work.block_m)

    def attend_small(self) -> None:
        """Spans of a few rows."""
        self._attend(self.work.small, SMALL_ROWS)

    def _attend(self, items: Tensor, block_m: int) -> None:
        from pipeline.engine.kernels import triton_programs

        if not len(items):
            return
        query, keys, values, rules = self.query, self.keys, self.values, self.rules
        head_dim = query.shape[2]
        tiling = choose_tiling(head_dim, query.element_size(), block_m)
        triton_programs.attend_items[(len(items), keys.shape[0])](
            query, keys, values, self.work.positions, items, self.part_out, self.part_lse,
            query.stride(0), query.stride(1),
            keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            rules.scale, rules.softcap, rules.window,
            HAS_SOFTCAP=bool(rules.softcap), HAS_WINDOW=bool(rules.window),
            REP=self.work.rep, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=tiling.keys,
            BLOCK_D=tiling.width, num_warps=tiling.warps, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip

    def merge(self) -> Tensor:
        """Join the parts of each token."""
        from pipeline.engine.kernels import triton_programs

        tokens, heads, head_dim = self.out.shape
        sinks = self.rules.sinks
        triton_programs.merge_partials[(tokens, heads)](
            self.part_out, self.part_lse, self.work.offsets, self.work.partials,
            self.part_lse if sinks is None else sinks, self.out,
            HAS_SINKS=sinks is not None, HEAD_DIM=head_dim,
            BLOCK_P=_MERGED_AT_ONCE, BLOCK_D=_width(head_dim), num_warps=2,
            enable_fp_fusion=True,
        )  # fmt: skip
        return self.out


class Tiling(NamedTuple):
    """How a program cuts its item: `keys` of a block, `width` of a head rounded up, `warps`."""

    keys: int
    width: int
    warps: int


def choose_tiling(head_dim: int, number_bytes: int, block_m: int) -> Tiling:
    """For tiles of `block_m` rows of heads of that size."""
    width = _width(head_dim)
    row_bytes = width * number_bytes
    tile_bytes = block_m * row_bytes
    if number_bytes == 4:  # no tensor core: a thread holds its rows of both factors in registers
        return Tiling(16, width, min(16, max(4, tile_bytes // _FLOAT32_WARP_BYTES)))
    keys = max(16, min(128, _KEY_BLOCK_BYTES // row_bytes))
    return Tiling(keys, width, 8 if tile_bytes > _WARP_TILE_BYTES else 4)


def _width(head_dim: int) -> int:
    """A head rounded up to a power of two: the least that a tensor core takes is 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
