"""Do a token's bits depend on anything but its row, on this very model and machine? Asked at load.

The logits of every token of one random prompt, computed alone in one forward, are compared bit for
bit with those of other ways to the same tokens:

```
 the same call twice             prompt
 each tile size, another slot    others .. | prompt | .. others, so that the tile has that size
 prompt cut into spans        [range] [range] .. [range] prompt's end
 decode, with rows beside it     .. | one token | ..
```

What the engine does in a job is made of these. A BLAS, a thread count or a model for which one of
them does not hold is refused, since strict mode would promise too much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import Packer, Piece, PlacedSlots, pack_decode, pack_prefill
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import UsageError

_PROMPT = 70  # more than a key tile of the kernel, so that a row's state is carried on
_DECODED = 3
_CUTS = (0.2, 0.25, 0.7)  # of the prompt: where one range ends and the next begins
_BESIDE = 5  # decoding rows before the one that is compared
_NOTHING = np.zeros(0, np.int64)


def strict_probe(engine: PrefixEngine) -> int:
    """The number of comparisons, all equal in bits. Raises UsageError naming the first that is not.

    Costs about a prefill of 2,000 tokens.
    """
    trial = _Trial(engine)
    with torch.inference_mode():
        expected = trial.alone()
        ways = list(trial.ways())
        for promise, way in ways:
            if not torch.equal(way(), expected):
                raise UsageError(
                    f"--fidelity strict: on this machine the bits of this model's logits are not "
                    f"the same {promise}; leave it out, or try another number of threads"
                )
    return len(ways)


class _Trial:
    """One random prompt and the ways to its logits [prompt, V]; every way has fresh KV."""

    def __init__(self, engine: PrefixEngine) -> None:
        self.engine = engine
        self._packer = Packer(engine.backend.kernel, engine.loaded.device)
        shape = engine.loaded.shape
        self._length = min(_PROMPT, shape.context_length or _PROMPT)
        self._ids = np.random.default_rng(0).integers(0, shape.vocabulary_size, self._length)
        # A forward that is not tiled has the prompt's own size.
        self._sizes = engine.backend.tile_sizes or (self._length,)

    def ways(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """(what it shows, completing "the same ..", a call that computes the logits)."""
        yield "in the same call twice", self.alone
        for size in self._sizes:
            yield f"in tiles of {size} tokens, at another slot", partial(self.beside, size)
        yield "when a prompt is cut into ranges", self.in_ranges
        yield "in decode as in prefill", self.decoded

    def alone(self) -> Tensor:
        return self._prefill([self._piece(0, self._length, 0)], self._cache(), 0)

    def beside(self, size: int) -> Tensor:
        """Tiles of `size`, the prompt at their end; where it is too long, part by part."""
        cache, step = self._cache(size), min(size - 1, self._length)
        logits = []
        for low in range(0, self._length, step):
            high = min(low + step, self._length)
            others = self._others(size - (high - low), low)
            pieces = [*others, self._piece(low, high, 0)]
            logits.append(self._prefill(pieces, cache, size - (high - low)))
        return torch.cat(logits)

    def in_ranges(self) -> Tensor:
        """Each range is a prefill of its own, in slots far from the others'."""
        cache, logits = self._cache(4 * self._length), []
        edges = [0, *(int(share * self._length) for share in _CUTS), self._length]
        ranges: list[PlacedSlots] = []
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            slot = (len(edges) - i) * self._length
            piece = Piece(self._ids[low:high], low, slot, 0, tuple(ranges))
            logits.append(self._prefill([piece], cache, 0))
            ranges.append(PlacedSlots(slot, slot + high - low, low))
        return torch.cat(logits)

    def decoded(self) -> Tensor:
        """The last tokens one by one, with other rows before them."""
        cache, low = self._cache(_BESIDE + 1), self._length - _DECODED
        logits = [self._prefill([self._piece(0, low, 0)], cache, 0)]
        rows = np.arange(_BESIDE)
        first = np.append(self._length + rows, 0)
        for position in range(low, self._length):
            batch = pack_decode(
                np.append(self._ids[rows], self._ids[position]),
                np.append(np.zeros(_BESIDE, np.int64), position),
                (first, np.append(first[:-1] + 1, position + 1)),
                np.zeros((0, 5), np.int64),
                self._packer,
            )
            keep = torch.arange(_BESIDE + 1)
            logits.append(self.engine.backend.forward(batch, cache, keep)[-1:])
        return torch.cat(logits)

    def _piece(self, low: int, high: int, slot: int) -> Piece:
        """Prompt positions `[low, high)`, the prompt's KV lying from `slot` on."""
        return Piece(self._ids[low:high], low, slot + low, low, ())

    def _others(self, count: int, seed: int) -> list[Piece]:
        """`count` tokens of other prompts, none longer than the context."""
        draw = np.random.default_rng(seed + 1)
        pieces = []
        for low in range(0, count, self._length):
            length = min(self._length, count - low)
            ids = draw.integers(0, self.engine.loaded.shape.vocabulary_size, length)
            slot = self._length + low
            pieces.append(Piece(ids, 0, slot, 0, ()))
        return pieces

    def _prefill(self, pieces: list[Piece], cache: KVCache, first: int) -> Tensor:
        """Logits of all packed tokens from number `first` on; the head computes all of them."""
        batch = pack_prefill(pieces, (_NOTHING, _NOTHING), self._packer)
        return self.engine.backend.forward(batch, cache, torch.arange(batch.input_ids.shape[1]))[
            first:
        ]

    def _cache(self, more: int = 0) -> KVCache:
        """Room for the prompt and `more` tokens."""
        loaded = self.engine.loaded
        shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.head_dim)
        return KVCache(shape, 2 * self._length + more, like=next(loaded.model.parameters()))
