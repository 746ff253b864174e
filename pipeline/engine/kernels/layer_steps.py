"""Starts the Triton programs around attention. Meaning of each: the function of `layer_rules` that
has its name and `_reference` behind it. Imports without triton.

As in `triton_kernel`, sizes follow from shapes alone and the host reads nothing back, so that a
step can be recorded into a CUDA graph; `TRITON_INTERPRET=1` runs the programs on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.engine.kernels.layer_rules import Activation, Heads, Joint, Place, Viewing

_NUMBERS_A_WARP = 512  # 16 a thread
_MOST_WARPS = 16
_PAIRS_A_PROGRAM = 512  # 4 a thread of 4 warps
_GATED_A_PROGRAM = 1024


def join(x: Tensor, y: Tensor | None, joint: Joint, rows: Tensor | None = None) -> Tensor:
    """See `join_reference`; x and y are dense."""
    from pipeline.engine.kernels import layer_programs

    before, after = joint.before, joint.after
    if y is None and before is None:
        return x
    assert x.is_contiguous() and (y is None or y.is_contiguous()), "the program takes dense rows"
    assert rows is None or before is not None, "chosen rows are normed"
    count, width = len(x) if rows is None else len(rows), x.shape[1]
    out = x if before is None else x.new_empty(count, width)
    block = _power_of_two(width)
    if count:
        layer_programs.join[(count,)](
            x, x if y is None else y, x if rows is None else rows,
            x if after is None else after.weight, x if before is None else before.weight, out,
            0.0 if after is None else after.eps, 0.0 if before is None else before.eps,
            joint.multiplier,
            HAS_ADDED=y is not None, HAS_AFTER=after is not None, HAS_BEFORE=before is not None,
            HAS_ROWS=rows is not None, WIDTH=width, BLOCK=block,
            num_warps=min(_MOST_WARPS, max(4, block // _NUMBERS_A_WARP)), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def rotate_and_store(
    qkv: Tensor, heads: Heads, place: Place, viewing: Viewing | None = None
) -> Tensor:
    """See `rotate_and_store_reference`; qkv is dense."""
    from pipeline.engine.kernels import layer_programs

    keys, values, slots = place
    kv_heads, _, head_dim = keys.shape
    tokens, num_heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    assert qkv.is_contiguous() and keys.stride(2) == values.stride(2) == 1, "a head is in pieces"
    views = 0 if viewing is None else len(viewing.owner)
    query = qkv.new_empty(tokens + views, num_heads, head_dim)
    cos, sin = heads.turn or (qkv, qkv)
    owner, turn = (slots, None) if viewing is None else viewing
    view_cos, view_sin = turn or (qkv, qkv)
    assert heads.turn is None or cos.stride() == sin.stride() == (cos.stride(0), 1)
    assert (heads.turn is None) == (turn is None) or viewing is None, "views turn as tokens do"
    assert turn is None or (view_cos.is_contiguous() and view_cos.shape[1] == heads.pairs)
    norms = heads.norms
    block_p = _power_of_two(heads.pairs)
    every = num_heads + 2 * kv_heads
    block_h = max(1, min(_PAIRS_A_PROGRAM // block_p, _power_of_two(every)))
    is_of_all = norms is not None and len(norms.weight) != 2
    layer_programs.rotate_and_store[(tokens + views, -(-every // block_h))](
        qkv, cos, sin, owner, view_cos, view_sin, slots, qkv if norms is None else norms.weight,
        query, keys, values, cos.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), tokens,
        0.0 if norms is None else norms.eps,
        HAS_TURN=heads.turn is not None, HAS_VIEWS=views > 0,
        NORM="none" if norms is None else "all" if is_of_all else "head",
        Q_HEADS=num_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PAIRS=heads.pairs,
        BLOCK_H=block_h, BLOCK_P=block_p, BLOCK_R=_power_of_two(head_dim - 2 * heads.pairs),
        BLOCK_ALL=_power_of_two(num_heads * head_dim) if is_of_all else 1, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return query


def gate(both: Tensor, activation: Activation) -> Tensor:
    """See `gate_reference`; `both` is dense."""
    from pipeline.engine.kernels import layer_programs

    assert both.is_contiguous(), "the program takes dense rows"
    rows, width = len(both), both.shape[1] // 2
    out = both.new_empty(rows, width)
    layer_programs.gate[(rows, -(-width // _GATED_A_PROGRAM))](
        both, out, width, ACTIVATION=activation, BLOCK=_GATED_A_PROGRAM, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
