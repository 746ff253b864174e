"""The two programs of the GPU kernel, in Triton. Importing this file needs triton.

`attend_items` computes partial results over a range of keys, `merge_partials` joins those of a
token. Meaning: `rules.py`; what an item is: `work_items.py`; who starts them: `triton_kernel.py`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize_on_alignment=["positions", "items"])
def attend_items(
    query,  # [V, Hq, d]
    keys,  # [Hkv, capacity, d]
    values,  # [Hkv, capacity, d]
    positions,  # [V]
    items,  # [items, 6] int64
    part_out,  # [partials, Hq, d] float32
    part_lse,  # [partials, Hq] float32, base 2
    query_stride_n,
    query_stride_h,
    keys_stride_h,
    keys_stride_n,
    values_stride_h,
    values_stride_n,
    scale,
    softcap,
    window,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    REP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of two
):
    """Program (item, KV head): its queries against its keys, online softmax in base 2, float32.

    Blocks of keys that all of its queries see, nearly all of a prefix, pass without masks.
    """
    item = items + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    q_lo = tl.load(item).to(tl.int32)
    q_hi = tl.load(item + 1).to(tl.int32)
    if q_lo == q_hi:  # padding up to the length that a CUDA graph was recorded for
        return
    kv_lo = tl.load(item + 2)
    num_keys = (tl.load(item + 3) - kv_lo).to(tl.int32)
    position = tl.load(item + 4).to(tl.int32)
    part_lo = tl.load(item + 5)

    # Row r of the tile is head r % REP of query r // REP: K and V serve the whole group.
    row = tl.arange(0, BLOCK_M)
    nth = q_lo + row // REP
    head = kv_head * REP + row % REP
    is_row = nth < q_hi
    column = tl.arange(0, BLOCK_D)
    is_column = column < HEAD_DIM
    is_cell = is_row[:, None] & is_column[None, :]
    at = nth.to(tl.int64) * query_stride_n + head.to(tl.int64) * query_stride_h
    q = tl.load(query + at[:, None] + column[None, :], mask=is_cell, other=0.0)

    # Key j of the item stands at `position + j`: a row sees those of (last - window, last].
    last = tl.load(positions + nth, mask=is_row, other=0).to(tl.int32) - position
    latest = tl.max(tl.where(is_row, last, -position))
    earliest = tl.min(tl.where(is_row, last, latest))
    high = tl.minimum(num_keys, latest + 1)
    low = 0
    first_whole = 0  # [first_whole, end_whole) are seen by all rows
    if HAS_WINDOW:
        low = tl.maximum(0, earliest - window + 1)
        before = tl.maximum(low, latest - window + 1)
        first_whole = tl.minimum(high, low + tl.cdiv(before - low, BLOCK_N) * BLOCK_N)
    whole = tl.maximum(0, tl.minimum(high, earliest + 1) - first_whole)
    end_whole = first_whole + whole // BLOCK_N * BLOCK_N

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    keys += kv_head.to(tl.int64) * keys_stride_h + kv_lo * keys_stride_n
    values += kv_head.to(tl.int64) * values_stride_h + kv_lo * values_stride_n
    if HAS_WINDOW:
        best, total, acc = _attend_keys(
            best, total, acc, q, last, keys, values, keys_stride_n, values_stride_n,
            scale, softcap, window, low, first_whole,
            True, HAS_SOFTCAP, HAS_WINDOW, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    best, total, acc = _attend_keys(
        best, total, acc, q, last, keys, values, keys_stride_n, values_stride_n,
        scale, softcap, window, first_whole, end_whole,
        False, HAS_SOFTCAP, HAS_WINDOW, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    best, total, acc = _attend_keys(
        best, total, acc, q, last, keys, values, keys_stride_n, values_stride_n,
        scale, softcap, window, end_whole, high,
        True, HAS_SOFTCAP, HAS_WINDOW, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    seen_any = total > 0.0
    acc = acc / tl.where(seen_any, total, 1.0)[:, None]
    lse = tl.where(seen_any, best + tl.log2(tl.where(seen_any, total, 1.0)), float("-inf"))
    num_heads = tl.num_programs(1) * REP
    to = (part_lo + row // REP) * num_heads + head
    tl.store(part_out + to[:, None] * HEAD_DIM + column[None, :], acc, mask=is_cell)
    tl.store(part_lse + to, lse, mask=is_row)


@triton.jit
def _attend_keys(
    best,  # [BLOCK_M] base 2
    total,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_D]
    q,
    last,  # [BLOCK_M] the last key that a row sees
    keys,
    values,
    keys_stride_n,
    values_stride_n,
    scale,
    softcap,
    window,
    low,
    high,
    IS_MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Go on with the softmax over keys `[low, high)`; without masks they are whole blocks, and
    every row sees all of them."""
    column = tl.arange(0, BLOCK_D)
    is_column = (column < HEAD_DIM)[None, :]
    to_base_2 = scale * _LOG2_E
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        is_key = (j < high)[:, None] & is_column
        k_at = keys + j[:, None] * keys_stride_n + column[None, :]
        v_at = values + j[:, None] * values_stride_n + column[None, :]
        if IS_MASKED:
            k = tl.load(k_at, mask=is_key, other=0.0)
        elif HEAD_DIM == BLOCK_D:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=is_column, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
            scores = 2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0
            to_base_2 = softcap * _LOG2_E
        if IS_MASKED:
            age = last[:, None] - j[None, :]
            is_seen = (age >= 0) & (j < high)[None, :]
            if HAS_WINDOW:
                is_seen = is_seen & (age < window)
            scores = tl.where(is_seen, scores * to_base_2, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(scores - base[:, None])
            decay = tl.exp2(best - base)
            v = tl.load(v_at, mask=is_key, other=0.0)
        else:  # the greatest first, so that scaling and subtracting are one instruction
            new_best = tl.maximum(best, tl.max(scores, 1) * to_base_2)
            weights = tl.exp2(scores * to_base_2 - new_best[:, None])
            decay = tl.exp2(best - new_best)
            if HEAD_DIM == BLOCK_D:
                v = tl.load(v_at)
            else:
                v = tl.load(v_at, mask=is_column, other=0.0)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        best = new_best
    return best, total, acc


@triton.jit(do_not_specialize_on_alignment=["offsets", "partials"])
def merge_partials(
    part_out,  # [partials, Hq, d] float32
    part_lse,  # [partials, Hq] float32, base 2
    offsets,  # [N + 1] int64
    partials,  # [partials] int64
    sinks,  # [Hq] float32
    out,  # [N, Hq, d]
    HAS_SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (token, head): join what its queries gave, add the sink once; none give zeros."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    low = tl.load(offsets + token).to(tl.int32)
    high = tl.load(offsets + token + 1).to(tl.int32)
    column = tl.arange(0, BLOCK_D)
    is_column = column < HEAD_DIM
    best = float("-inf")
    total = 0.0
    if HAS_SINKS:
        best = tl.load(sinks + head) * _LOG2_E
        total = 1.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        is_part = index < high
        source = tl.load(partials + index, mask=is_part, other=0) * num_heads + head
        lse = tl.load(part_lse + source, mask=is_part, other=float("-inf"))
        part = tl.load(
            part_out + source[:, None] * HEAD_DIM + column[None, :],
            mask=is_part[:, None] & is_column[None, :],
            other=0.0,
        )
        new_best = tl.maximum(best, tl.max(lse, 0))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(lse - base)
        decay = tl.exp2(best - base)
        acc = acc * decay + tl.sum(part * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        best = new_best
    acc = acc / tl.where(total > 0.0, total, 1.0)
    to = (token.to(tl.int64) * num_heads + head) * HEAD_DIM
    tl.store(out + to + column, acc.to(out.dtype.element_ty), mask=is_column)
