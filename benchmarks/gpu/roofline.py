"""The least that attention of a layer and a whole step can take on a card: bytes and operations.

Whatever is read must be read once, whatever is multiplied must be multiplied once; the floor of a
part is the larger of the two, since a card does both at a time. The floor of a step is the sum over
its parts, which run one after another. A byte floor alone is too low a bar for long prefixes: from
some 8,000 tokens on, 256 rows are bound by arithmetic.

`predict` adds what no floor has: the time to start each kernel, passes over the hidden states, the
host's part, and how near kernels come to their floors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.limit import Dimensions

_BYTES = 2  # of a number in bfloat16
_KERNELS_A_STEP = 8  # beside its layers: embedding, rotary tables, last norm, head, greedy token


@dataclass(frozen=True, slots=True)
class Card:
    """`bytes_per_s` of a copy, read and written; `flop_per_s` of a large bfloat16 product;
    `start_s` between two kernels of a graph."""

    bytes_per_s: float
    flop_per_s: float
    start_s: float = 1.3e-6


H100 = Card(3.0e12, 7.9e14)
"""As others have measured it: a copy, 8192³ in bfloat16, and Hazy Research's gap (2025-05)."""


class Part(NamedTuple):
    """Bytes that a part of a step must move and operations that it must do."""

    bytes: float
    flop: float

    def floor_s(self, card: Card) -> float:
        return max(self.bytes / card.bytes_per_s, self.flop / card.flop_per_s)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step decodes: `rows` below a prefix of `shared` tokens, with `own` tokens each."""

    rows: int
    shared: int
    own: int


def attention(model: Dimensions, rows: Rows) -> tuple[Part, Part]:
    """Of one layer: the shared prefix, and the rows' own keys."""
    own = rows.rows * rows.own
    return _attend(model, rows.shared, rows.rows * rows.shared), _attend(model, own, own)


def unshared_attention(model: Dimensions, rows: Rows) -> Part:
    """Of one layer, where every row reads the prefix for itself."""
    keys = rows.rows * (rows.shared + rows.own)
    return _attend(model, keys, keys)


def products(model: Dimensions, rows: int) -> list[Part]:
    """The matrix products of a step: those of all layers, and the head's."""
    kv = model.kv_heads * _head_dim(model)
    layer = [(model.hidden, model.hidden)] * 2 + [(model.hidden, kv)] * 2
    layer += [(model.hidden, model.intermediate)] * 3
    sizes = layer * model.layers + [(model.hidden, model.vocabulary)]
    return [Part((a * b + rows * (a + b)) * _BYTES, 2 * rows * a * b) for a, b in sizes]


def step_floor_s(model: Dimensions, rows: Rows, card: Card) -> float:
    """Of one decode step of the whole model, by bytes and operations."""
    layer = sum(part.floor_s(card) for part in attention(model, rows))
    return model.layers * layer + sum(p.floor_s(card) for p in products(model, rows.rows))


def byte_floor_s(model: Dimensions, rows: Rows, card: Card) -> float:
    """Of one decode step: all weights that it reads and all live KV, each once; nothing else."""
    weights = model.body_weights + model.head_weights
    kv = (rows.shared + rows.rows * rows.own) * model.layers * _kv_numbers(model)
    return (weights + kv) * _BYTES / card.bytes_per_s


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine adds to the floors. `kernels` that a layer starts; `passes` over all rows'
    hidden states, each read and written, beside products and attention; `host_s` a step that the
    card waits; the share of their floors' rates that products and attention reach."""

    kernels: int
    passes: float
    host_s: float
    products: float = 0.85
    attention: float = 0.6


def predict(model: Dimensions, rows: Rows, card: Card, engine: Engine) -> dict[str, float]:
    """Seconds of a decode step by part, and in all."""
    layer = sum(part.floor_s(card) for part in attention(model, rows))
    pass_s = 2 * rows.rows * model.hidden * _BYTES / card.bytes_per_s
    parts = {
        "products_s": sum(p.floor_s(card) for p in products(model, rows.rows)) / engine.products,
        "attention_s": model.layers * layer / engine.attention,
        "starts_s": (model.layers * engine.kernels + _KERNELS_A_STEP) * card.start_s,
        "passes_s": model.layers * engine.passes * pass_s,
        "host_s": engine.host_s,
    }
    return parts | {"step_s": sum(parts.values())}


def _attend(model: Dimensions, keys: int, pairs: int) -> Part:
    """Attention of one layer that reads so many keys and values for so many (row, key)."""
    return Part(keys * _kv_numbers(model) * _BYTES, 4 * model.hidden * pairs)


def _kv_numbers(model: Dimensions) -> int:
    """Numbers of a token's key and value in one layer."""
    return 2 * model.kv_heads * _head_dim(model)


def _head_dim(model: Dimensions) -> int:
    return model.hidden // model.heads
