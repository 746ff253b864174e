"""From the spans of a forward to the work items of the GPU kernel. Knows no tensors, no model.

A *work item* is a tile of queries times a range of keys. A long shared prefix becomes many items,
so that even a few rows keep the whole card busy, and an item reads its keys once for its tile:

```
             keys of one span, cut into even parts of at most `split_keys`
             |-- item --|-- item --|-- item --|
  its        |-- item --|-- item --|-- item --|   a tile is `block_m` rows of one KV head:
  queries    |-- item --|-- item --|-- item --|   block_m // rep tokens, rep query heads of each
```

An item writes one partial result for each of its queries; a second kernel joins those of a token,
of its own query and of its views alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.kernels.rules import KVSpans

ITEM_FIELDS = 6
SMALL_ROWS = 16  # the fewest that a tensor core takes; a decoding row's own range needs no more
_FEWEST_KEYS = 256  # of a cut: each one costs a partial result per row, written and read again

Items = NDArray[np.int64]
"""[items, 6]: q_lo, q_hi, kv_lo, kv_hi, position of kv_lo, number of q_lo's partial."""


@dataclass(frozen=True, slots=True)
class WorkShape:
    """How large a plan is. A CUDA graph recorded for one shape serves all plans that fit in it.

    `views`: queries beside those of the tokens themselves.
    """

    tokens: int
    large: int
    small: int
    partials: int
    views: int = 0

    @property
    def queries(self) -> int:
        return self.tokens + self.views

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of each part of `WorkItems.flatten`.

        All even: a part that is aligned to 16 bytes at times only would make Triton compile twice.
        """
        counts = (
            ITEM_FIELDS * self.large, ITEM_FIELDS * self.small,
            self.tokens + 1, self.partials, self.queries,
        )  # fmt: skip
        return tuple(count + count % 2 for count in counts)


@dataclass(frozen=True, slots=True)
class WorkItems:
    """What the kernels do in one forward, the same in all layers.

    `large` items have tiles of `block_m` rows, `small` ones of `SMALL_ROWS`. The partials of token
    t are `partials[offsets[t] : offsets[t + 1]]`. `positions` [queries], `offsets` [tokens + 1].
    """

    block_m: int
    rep: int
    large: Items
    small: Items
    offsets: NDArray[np.int64]
    partials: NDArray[np.int64]
    positions: NDArray[np.int64]

    @property
    def shape(self) -> WorkShape:
        tokens = len(self.offsets) - 1
        views = len(self.positions) - tokens
        return WorkShape(tokens, len(self.large), len(self.small), len(self.partials), views)

    def flatten(self, shape: WorkShape) -> NDArray[np.int64]:
        """large, small, offsets, partials, positions as one vector: one copy to the device.

        Padded with zeros, which do nothing: items without queries, tokens without partials. Views
        follow the tokens, so where there are some no token is added before them.
        """
        is_shifted = self.shape.views and shape.tokens != self.shape.tokens
        assert not is_shifted, f"{self.shape} does not fit into {shape}"
        parts = (
            self.large.ravel(), self.small.ravel(), self.offsets, self.partials, self.positions,
        )  # fmt: skip
        flat = np.zeros(sum(shape.lengths), np.int64)
        low = 0
        for part, length in zip(parts, shape.lengths, strict=True):
            assert len(part) <= length, f"{self.shape} does not fit into {shape}"
            flat[low : low + len(part)] = part
            low += length
        return flat


def plan_work(
    spans: KVSpans,
    positions: NDArray[np.int64],
    rep: int,
    block_m: int,
    split_keys: int,
    owner: NDArray[np.int64] | None = None,
) -> WorkItems:
    """Cut spans into items of at most `block_m` rows (queries x `rep`) and `split_keys` keys."""
    assert rep <= block_m, f"a tile of {block_m} rows cannot hold the {rep} query heads of a token"
    items = _drop_future(_cut(spans, block_m // rep, split_keys), positions)
    queries = items[:, 1] - items[:, 0]
    items[:, 5] = np.cumsum(queries) - queries
    token = np.arange(queries.sum()) + np.repeat(items[:, 0] - items[:, 5], queries)
    num_tokens = len(positions)
    if owner is not None:
        token, num_tokens = owner[token], int(owner.max(initial=-1)) + 1
    offsets = np.zeros(num_tokens + 1, np.int64)
    np.cumsum(np.bincount(token, minlength=num_tokens), out=offsets[1:])
    is_small = queries * rep <= SMALL_ROWS
    partials = np.argsort(token, kind="stable")
    return WorkItems(block_m, rep, items[~is_small], items[is_small], offsets, partials, positions)


def choose_split_keys(spans: KVSpans, rep: int, block_m: int, kv_heads: int, programs: int) -> int:
    """Keys of an item such that about `programs` equal ones would be the whole work."""
    tiles = -(-(spans[:, 1] - spans[:, 0]) * rep // block_m)
    keys = int((tiles * (spans[:, 3] - spans[:, 2])).sum()) * kv_heads
    return max(_FEWEST_KEYS, -(-keys // programs))


def _cut(spans: KVSpans, tile: int, split_keys: int) -> Items:
    """Items by span, then keys, then queries: neighbours read the same keys, out of the cache."""
    tokens, keys = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
    tiles, splits = -(-tokens // tile), -(-keys // split_keys)
    count = tiles * splits
    source = np.repeat(np.arange(len(spans)), count)
    nth = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
    split, index = np.divmod(nth, tiles[source])
    q_lo, q_hi, kv_lo, kv_hi, position = spans[source].T
    step = -(-keys // np.maximum(splits, 1))[source]
    first = split * step
    items = np.empty((len(source), ITEM_FIELDS), np.int64)  # the first partial's number comes later
    items[:, 0] = q_lo + index * tile
    items[:, 1] = np.minimum(items[:, 0] + tile, q_hi)
    items[:, 2] = kv_lo + first
    items[:, 3] = np.minimum(items[:, 2] + step, kv_hi)
    items[:, 4] = position + first
    return items


def _drop_future(items: Items, positions: NDArray[np.int64]) -> Items:
    """Without the items whose keys all come after all of their queries."""
    if not len(items):
        return items
    bounded = np.append(positions, 0)  # `reduceat` takes no index past the end
    latest = np.maximum.reduceat(bounded, items[:, :2].ravel())[::2]
    return items[items[:, 4] <= latest]
