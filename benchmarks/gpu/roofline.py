"""The least that attention of a layer and a whole step can take on a card: bytes and operations.

Whatever is read must be read once, whatever is multiplied must be multiplied once; the floor of a
part is the larger of the two, since a card does both at a time. The floor of a step is the sum over
its parts, which run one after another. A byte floor alone is too low a bar for long prefixes: from
some 8,000 tokens on, 256 rows are bound by arithmetic.

`predict` adds what no floor has: the time to start each kernel, the steps between products, what
attention reads to join its parts, the host's part, and how near kernels come to their floors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.limit import Dimensions
from pipeline.engine.strides import STEPS

_BYTES = 2  # of a number in bfloat16
_KERNELS_A_STEP = (
    18  # beside its layers: embedding, rotary tables, head, greedy token (launches.py)
)


@dataclass(frozen=True, slots=True)
class Card:
    """`bytes_per_s` of a copy, read and written; `flop_per_s` of a large bfloat16 product;
    `start_s` between two kernels of a graph; `cached_bytes_per_s` of what the kernel before has
    written, as long as that fits the cache."""

    bytes_per_s: float
    flop_per_s: float
    start_s: float = 1.3e-6
    cached_bytes_per_s: float = 5.5e12


H100 = Card(3.0e12, 7.9e14)
"""As others have measured it: a copy, 8192³ in bfloat16, Hazy Research's gap (2025-05), and what
L2 gives (Chips and Cheese, 2023)."""


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
    return _products(layer * model.layers + [(model.hidden, model.vocabulary)], rows)


def merged_products(model: Dimensions, rows: int) -> list[Part]:
    """The same, where those of the same input are one."""
    layer = [(model.hidden, _qkv(model)), (model.hidden, model.hidden)]
    layer += [(model.hidden, 2 * model.intermediate), (model.intermediate, model.hidden)]
    return _products(layer * model.layers + [(model.hidden, model.vocabulary)], rows)


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
    """What an engine adds to the floors. `kernels` that a layer starts; `numbers` that the steps
    between products read and write for one row of a layer; `host_s` a step that the card waits.

    The shares of their floors' rates that products, attention to the prefix (bound by arithmetic)
    and to rows' own keys (by bytes) reach, and the `partials` of a row that a layer joins, are as
    `ceilings` and `layer` should find them.
    """

    kernels: int
    numbers: Callable[[Dimensions], int]
    host_s: float
    is_merged: bool = False
    products: float = 0.85
    prefix: float = 0.6
    own: float = 0.8
    partials: int = 5


def numbers_fused(model: Dimensions) -> int:
    """Two joins: each reads and writes the sum, reads what is added and writes what is next; heads
    are read and stored; gate and up are read, their product written."""
    return 8 * model.hidden + 2 * _qkv(model) + 3 * model.intermediate


def numbers_unfused(model: Dimensions) -> int:
    """By the operations of transformers' Llama, numbers of four bytes counted twice: a norm 18 a
    number, an addition 3, the turning of Q and K 10, storing K and V 4, activation and gate 5."""
    kv = model.kv_heads * _head_dim(model)
    return 42 * model.hidden + 10 * (model.hidden + kv) + 4 * kv + 5 * model.intermediate


UNFUSED = Engine(kernels=42, numbers=numbers_unfused, host_s=7e-4)
"""transformers' layers, and a host that plans while the card waits."""

_BETWEEN_STRIDES_S = 1e-3
"""Of the host: tokens are given out, KV grows, the next stride is planned. Stage `host` has 0.7."""
FUSED = Engine(kernels=11, numbers=numbers_fused, host_s=_BETWEEN_STRIDES_S / STEPS, is_merged=True)
"""Within a stride the host is a step ahead, and the card waits for nobody."""


def predict(model: Dimensions, rows: Rows, card: Card, engine: Engine) -> dict[str, float]:
    """Seconds of a decode step by part, and in all. Logits are copied, and the largest is found."""
    shared, own = (part.floor_s(card) for part in attention(model, rows))
    joined = 4 * engine.partials * rows.rows * model.hidden / card.cached_bytes_per_s
    attended = shared / engine.prefix + own / engine.own + joined
    between = rows.rows * engine.numbers(model) * _BYTES / card.cached_bytes_per_s
    sizes = merged_products if engine.is_merged else products
    parts = {
        "products_s": sum(p.floor_s(card) for p in sizes(model, rows.rows)) / engine.products,
        "attention_s": model.layers * attended,
        "starts_s": (model.layers * engine.kernels + _KERNELS_A_STEP) * card.start_s,
        "between_s": model.layers * between,
        "logits_s": 3 * rows.rows * model.vocabulary * _BYTES / card.bytes_per_s,
        "host_s": engine.host_s,
    }
    return parts | {"step_s": sum(parts.values())}


def _products(sizes: list[tuple[int, int]], rows: int) -> list[Part]:
    return [Part((a * b + rows * (a + b)) * _BYTES, 2 * rows * a * b) for a, b in sizes]


def _attend(model: Dimensions, keys: int, pairs: int) -> Part:
    """Attention of one layer that reads so many keys and values for so many (row, key)."""
    return Part(keys * _kv_numbers(model) * _BYTES, 4 * model.hidden * pairs)


def _kv_numbers(model: Dimensions) -> int:
    """Numbers of a token's key and value in one layer."""
    return 2 * model.kv_heads * _head_dim(model)


def _qkv(model: Dimensions) -> int:
    """Numbers of Q, K and V of a token."""
    return model.hidden + 2 * model.kv_heads * _head_dim(model)


def _head_dim(model: Dimensions) -> int:
    return model.hidden // model.heads
