"""Cascade attention on a GPU: starts the Triton programs over work items. Knows no prompts.

Every launch takes its size from the shape of the work, never from its contents, and the host reads
nothing back, so that a step can be recorded into a CUDA graph. Imports without triton. Under
`TRITON_INTERPRET=1`, set before triton is first imported, the programs run on the CPU, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

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
    from pipeline.engine.kernels import triton_programs

    queries, heads, head_dim = query.shape
    tokens, kv_heads = work.shape.tokens, keys.shape[0]
    assert queries == work.shape.queries, f"{queries} queries, {work.shape.queries} planned"
    assert heads == kv_heads * work.rep, f"{heads} of {kv_heads} heads, {work.rep} a group planned"
    assert query.stride(2) == keys.stride(2) == values.stride(2) == 1, "a head is not contiguous"
    part_out = query.new_empty((work.shape.partials, heads, head_dim), dtype=torch.float32)
    part_lse = query.new_empty((work.shape.partials, heads), dtype=torch.float32)
    out = query.new_empty((tokens, heads, head_dim))
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    row_bytes = block_d * query.element_size()
    for items, block_m in ((work.large, work.block_m), (work.small, SMALL_ROWS)):
        if not len(items):
            continue
        triton_programs.attend_items[(len(items), kv_heads)](
            query, keys, values, work.positions, items, part_out, part_lse,
            query.stride(0), query.stride(1),
            keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            rules.scale, rules.softcap, rules.window,
            HAS_SOFTCAP=bool(rules.softcap), HAS_WINDOW=bool(rules.window),
            REP=work.rep, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_D=block_d,
            BLOCK_N=max(16, min(128, _KEY_BLOCK_BYTES // row_bytes)),
            num_warps=8 if block_m * row_bytes > _WARP_TILE_BYTES else 4,
            num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    triton_programs.merge_partials[(tokens, heads)](
        part_out, part_lse, work.offsets, work.partials,
        part_lse if rules.sinks is None else rules.sinks, out,
        HAS_SINKS=rules.sinks is not None, HEAD_DIM=head_dim,
        BLOCK_P=_MERGED_AT_ONCE, BLOCK_D=block_d, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
