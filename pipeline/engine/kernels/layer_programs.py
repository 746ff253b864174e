"""The steps around attention on a GPU, in Triton. Importing this file needs triton.

Each is one pass over its numbers, in float32, rounded once. Meaning: `layer_rules.py`; who starts
them: `layer_steps.py`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_TANH_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBE = tl.constexpr(0.044715)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def join(
    stream,  # [N, n] what all sublayers add to
    added,  # [N, n]
    rows,  # [R] int64
    after,  # [n] float32
    before,  # [n] float32
    out,  # [R, n]
    after_eps,
    before_eps,
    multiplier,
    HAS_ADDED: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH rounded up to a power of two
):
    """Program (row): add, and norm the sum. With `rows` the stream stays as it is."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_ROWS:
        source = tl.load(rows + row)
    column = tl.arange(0, BLOCK)
    is_column = column < WIDTH
    at = source * WIDTH + column
    total = tl.load(stream + at, mask=is_column, other=0.0)
    if HAS_ADDED:
        y = tl.load(added + at, mask=is_column, other=0.0).to(tl.float32)
        if HAS_AFTER:
            weight = tl.load(after + column, mask=is_column, other=0.0)
            y = y * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + after_eps) * weight
        total = (total.to(tl.float32) + y * multiplier).to(stream.dtype.element_ty)
        if not HAS_ROWS:
            tl.store(stream + at, total, mask=is_column)
    if HAS_BEFORE:
        x = total.to(tl.float32)
        weight = tl.load(before + column, mask=is_column, other=0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + before_eps) * weight
        tl.store(out + row * WIDTH + column, x.to(out.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots", "owner"])
def rotate_and_store(
    qkv,  # [N, Hq + 2 Hkv, d]
    cos,  # [N, at least PAIRS]
    sin,
    owner,  # [V - N] int64
    view_cos,  # [V - N, PAIRS] float32
    view_sin,
    slots,  # [N] int64
    norm_weight,  # [2, d] or [Hq + Hkv, d] float32
    query,  # [V, Hq, d]
    keys,  # [Hkv, capacity, d]
    values,
    turn_stride,
    keys_stride_h,
    keys_stride_n,
    values_stride_h,
    values_stride_n,
    num_tokens,
    eps,
    HAS_TURN: tl.constexpr,
    HAS_VIEWS: tl.constexpr,
    NORM: tl.constexpr,  # "none", of each "head", of "all" heads together
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,  # PAIRS rounded up
    BLOCK_R: tl.constexpr,  # what follows the pairs of a head, rounded up
    BLOCK_ALL: tl.constexpr,  # the numbers of all query heads, rounded up
):
    """Program (query, some heads): norm, turn, and store where each head belongs."""
    nth = tl.program_id(0).to(tl.int64)
    token = nth
    kv_heads = KV_HEADS
    if HAS_VIEWS:  # of a view nothing is stored but the queries
        view = tl.maximum(nth - num_tokens, 0)
        token = tl.where(nth < num_tokens, nth, tl.load(owner + view))
        kv_heads = tl.where(nth < num_tokens, KV_HEADS, 0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_query = head < Q_HEADS
    is_key = (head >= Q_HEADS) & (head < Q_HEADS + kv_heads)
    is_value = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + KV_HEADS + kv_heads)
    is_turned = is_query | is_key
    is_stored = is_turned | is_value

    pair = tl.arange(0, BLOCK_P)
    is_pair = pair < PAIRS
    cell = is_stored[:, None] & is_pair[None, :]
    row = token * ((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM)
    source = qkv + row + head[:, None] * HEAD_DIM + pair[None, :]
    a = tl.load(source, mask=cell, other=0.0).to(tl.float32)
    b = tl.load(source + PAIRS, mask=cell, other=0.0).to(tl.float32)
    beyond = 2 * PAIRS + tl.arange(0, BLOCK_R)
    is_beyond = is_stored[:, None] & (beyond < HEAD_DIM)[None, :]
    if HEAD_DIM > 2 * PAIRS:
        source = qkv + row + head[:, None] * HEAD_DIM + beyond[None, :]
        rest = tl.load(source, mask=is_beyond, other=0.0).to(tl.float32)

    if NORM != "none":
        if NORM == "head":
            sums = tl.sum(a * a, 1) + tl.sum(b * b, 1)
            if HEAD_DIM > 2 * PAIRS:
                sums += tl.sum(rest * rest, 1)
            mean = sums / HEAD_DIM
            of_weight = tl.where(is_query, 0, HEAD_DIM)
        else:
            wide = tl.arange(0, BLOCK_ALL)
            every = tl.load(qkv + row + wide, mask=wide < Q_HEADS * HEAD_DIM, other=0.0)
            every = every.to(tl.float32)
            of_queries = tl.sum(every * every, 0) / (Q_HEADS * HEAD_DIM)
            at_key = qkv + row + Q_HEADS * HEAD_DIM
            every = tl.load(at_key + wide, mask=wide < KV_HEADS * HEAD_DIM, other=0.0)
            every = every.to(tl.float32)
            of_keys = tl.sum(every * every, 0) / (KV_HEADS * HEAD_DIM)
            mean = tl.where(is_query, of_queries, of_keys)
            of_weight = head * HEAD_DIM
        factor = tl.where(is_turned, tl.rsqrt(mean + eps), 1.0)[:, None]
        weight = norm_weight + of_weight[:, None]
        is_normed = is_turned[:, None] & is_pair[None, :]
        a *= factor * tl.load(weight + pair[None, :], mask=is_normed, other=1.0)
        b *= factor * tl.load(weight + PAIRS + pair[None, :], mask=is_normed, other=1.0)
        if HEAD_DIM > 2 * PAIRS:
            is_normed = is_turned[:, None] & (beyond < HEAD_DIM)[None, :]
            rest *= factor * tl.load(weight + beyond[None, :], mask=is_normed, other=1.0)

    if HAS_TURN:
        c = tl.load(cos + token * turn_stride + pair, mask=is_pair, other=1.0).to(tl.float32)
        s = tl.load(sin + token * turn_stride + pair, mask=is_pair, other=0.0).to(tl.float32)
        c = c[None, :]
        s = s[None, :]
        turned = a * c - b * s
        b = tl.where(is_turned[:, None], b * c + a * s, b)
        a = tl.where(is_turned[:, None], turned, a)
        if HAS_VIEWS:
            at = view * PAIRS + pair
            c = tl.load(view_cos + at, mask=is_pair, other=1.0)[None, :]
            s = tl.load(view_sin + at, mask=is_pair, other=0.0)[None, :]
            is_seen = (head < tl.where(nth < num_tokens, 0, Q_HEADS))[:, None]
            turned = a * c - b * s
            b = tl.where(is_seen, b * c + a * s, b)
            a = tl.where(is_seen, turned, a)

    nth_head = head.to(tl.int64)[:, None]
    at_query = query + (nth * Q_HEADS + nth_head) * HEAD_DIM
    slot = tl.load(slots + token)
    key_head = nth_head - Q_HEADS
    at_key = keys + key_head * keys_stride_h + slot * keys_stride_n
    value_head = key_head - KV_HEADS
    at_value = values + value_head * values_stride_h + slot * values_stride_n
    to = query.dtype.element_ty
    first, second = pair[None, :], PAIRS + pair[None, :]
    mask = is_query[:, None] & is_pair[None, :]
    tl.store(at_query + first, a.to(to), mask=mask)
    tl.store(at_query + second, b.to(to), mask=mask)
    mask = is_key[:, None] & is_pair[None, :]
    tl.store(at_key + first, a.to(to), mask=mask)
    tl.store(at_key + second, b.to(to), mask=mask)
    mask = is_value[:, None] & is_pair[None, :]
    tl.store(at_value + first, a.to(to), mask=mask)
    tl.store(at_value + second, b.to(to), mask=mask)
    if HEAD_DIM > 2 * PAIRS:
        tl.store(at_query + beyond[None, :], rest.to(to), mask=is_query[:, None] & is_beyond)
        tl.store(at_key + beyond[None, :], rest.to(to), mask=is_key[:, None] & is_beyond)
        tl.store(at_value + beyond[None, :], rest.to(to), mask=is_value[:, None] & is_beyond)


@triton.jit
def gate(
    both,  # [N, 2 n] gate and up side by side
    out,  # [N, n]
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block of columns): act(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    source = both + row * 2 * width + column
    x = tl.load(source, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=is_column, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))
    else:  # 0.5 x (1 + tanh(z)) = x sigmoid(2 z)
        x = x * tl.sigmoid((x + x * x * x * _TANH_CUBE) * _TANH_SLOPE)
    tl.store(out + row * width + column, (x * up).to(out.dtype.element_ty), mask=is_column)
