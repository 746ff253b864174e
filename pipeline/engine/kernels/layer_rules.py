"""What the steps around attention compute, in plain torch: the words, and the slow oracle.

A decoder layer has four products and, between them, steps that are one pass over memory each:

```
 x, y ─ join ─► x, h ─ [Q K V] ─ rotate, store ─ attend ─ [O]  ─► y     x: what all layers add to
 x, y ─ join ─► x, h ─ [gate up] ─ gate ─────────────── [down] ─► y     y: what is added to it
```

All are computed in float32 and rounded once, to the dtype of what they take. `layer_steps` starts
the Triton programs that have this meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
Turn = tuple[Tensor, Tensor]
"""Cosines and sines [n, at least a column for each pair]; numbers j and j + pairs are a pair."""


@dataclass(frozen=True, slots=True)
class Norm:
    """x / rms(x) * weight. weight [n] float32."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., n] float32."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Joint(NamedTuple):
    """Between two sublayers: y goes through `after`, times `multiplier`, and is added to x; of the
    sum `before` makes what the next sublayer takes, None: the sum itself."""

    before: Norm | None
    after: Norm | None = None
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of query and key heads: `weight` [2, d] is theirs of each head, [Hq + Hkv, d] of
    all query heads together and of all key heads together; float32."""

    weight: Tensor
    eps: float


class Place(NamedTuple):
    """Where new keys and values go: `keys`, `values` [Hkv, capacity, d]; `slots` [N] int64."""

    keys: Tensor
    values: Tensor
    slots: Tensor


class Heads(NamedTuple):
    """What a layer makes of its heads: `norms` first; then the first 2 * `pairs` numbers of each
    query and key are turned by `turn`, one row a token; None: nothing is turned."""

    norms: HeadNorms | None
    turn: Turn | None
    pairs: int


class Viewing(NamedTuple):
    """More queries: those of tokens `owner` [n] int64, turned once more by `turn` [n, pairs]
    float32, if any."""

    owner: Tensor
    turn: Turn | None


def join_reference(x: Tensor, y: Tensor | None, joint: Joint, rows: Tensor | None = None) -> Tensor:
    """x, y [N, n]. Adds y, if any, to x in place, and returns what is next, [N, n].

    With `rows` [R] int64 only these are computed, [R, n], and x stays.
    """
    total = x if rows is None else x[rows]
    if y is not None:
        added = (y if rows is None else y[rows]).float()
        if joint.after is not None:
            added = joint.after(added)
        total = (total.float() + added * joint.multiplier).to(x.dtype)
        if rows is None:
            x.copy_(total)
    return total if joint.before is None else joint.before(total.float()).to(x.dtype)


def rotate_and_store_reference(
    qkv: Tensor, heads: Heads, place: Place, viewing: Viewing | None = None
) -> Tensor:
    """qkv [N, (Hq + 2 Hkv) * d]. Stores keys and values; returns the queries [V, Hq, d]: one of
    each token, then those of `viewing`."""
    kv_heads, _, head_dim = place.keys.shape
    every = qkv.view(len(qkv), -1, head_dim).float()
    num_heads = every.shape[1] - 2 * kv_heads
    query, key, value = torch.split(every, [num_heads, kv_heads, kv_heads], 1)
    if heads.norms is not None:
        query, key = _normalized(query, key, heads.norms)
    if heads.turn is not None:
        query, key = (_turned(x, heads.turn, heads.pairs) for x in (query, key))
    place.keys[:, place.slots] = key.transpose(0, 1).to(qkv.dtype)
    place.values[:, place.slots] = value.transpose(0, 1).to(qkv.dtype)
    if viewing is not None:
        seen = query[viewing.owner]
        if viewing.turn is not None:
            seen = _turned(seen, viewing.turn, heads.pairs)
        query = torch.cat([query, seen])
    return query.to(qkv.dtype)


def gate_reference(both: Tensor, activation: Activation) -> Tensor:
    """both [N, 2 n], gate and up side by side -> act(gate) * up, [N, n]."""
    gate, up = both.float().chunk(2, -1)
    return (activate(gate, activation) * up).to(both.dtype)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """By its name."""
    if activation == "silu":
        return silu(x)
    return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _normalized(query: Tensor, key: Tensor, norms: HeadNorms) -> tuple[Tensor, Tensor]:
    if len(norms.weight) == 2:
        of_query, of_key = (Norm(weight, norms.eps) for weight in norms.weight)
        return of_query(query), of_key(key)
    weights = torch.split(norms.weight, [query.shape[1], key.shape[1]])
    of_query, of_key = (Norm(weight.flatten(), norms.eps) for weight in weights)
    return of_query(query.flatten(1)).view_as(query), of_key(key.flatten(1)).view_as(key)


def _turned(x: Tensor, turn: Turn, pairs: int) -> Tensor:
    """x [n, H, d] float32."""
    cos, sin = (part[:, None, :pairs].float() for part in turn)
    a, b, rest = torch.split(x, [pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
