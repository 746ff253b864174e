"""How often the nearest embedding is not the longest stored prefix, as a store grows.

For each query: the stored prompt that is nearest by embedding, and the stored prompts that share
most token ids with it from the start. The first may reuse what it shares (any r), or, by the
paper's rule, all of itself or nothing (r = k). Both are compared with the best there is.
"""

from __future__ import annotations

import random
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.experiment.retrieval import EmbeddingIndex, TextEncoder
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.tree import common_length

_CUTS = 8
_END = re.compile(r"\n|[.!?] ")


@dataclass(frozen=True)
class NeighbourRow:
    """At one size of the store. Shares are of the queries, losses of prompt tokens.

    `misses`: the nearest shares less than the longest stored prefix. `whole_prefixes`: queries that
    begin with all of some stored prompt; `whole_misses`: of those, where the nearest is no such
    prompt, or a shorter one. `tokens_lost`: of what could be reused, the share that the nearest
    leaves; `tokens_lost_whole`: that the paper's rule leaves.
    """

    stored: int
    queries: int
    misses: float
    whole_prefixes: float
    whole_misses: float
    tokens_lost: float
    tokens_lost_whole: float
    embed_s: float
    search_s: float


def make_corpus(
    texts: Sequence[str], stored: int, queries: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Texts to store and to ask. Stored ones are prompts, and prompts cut at ends of lines and
    sentences, as a store has them whose prompts grew; none of those asked is stored whole."""
    draw = random.Random(seed)
    distinct = draw.sample(sorted(set(texts)), len(set(texts)))
    asked, left = distinct[:queries], distinct[queries:]
    kept = set(left)
    for text in left:
        ends = [match.end() for match in _END.finditer(text)]
        kept.update(text[:end] for end in draw.sample(ends, min(_CUTS, len(ends))))
    kept -= set(asked)
    pool = [text for text in sorted(kept) if text.strip()]
    return draw.sample(pool, min(stored, len(pool))), asked


def study_neighbours(
    encoder: TextEncoder,
    encode: Callable[[Sequence[str]], list[TokenIds]],
    corpus: tuple[Sequence[str], Sequence[str]],
    sizes: Sequence[int],
) -> list[NeighbourRow]:
    """One row a size; a store of n holds the first n of the texts to store."""
    stored, asked = corpus
    begin = time.perf_counter()
    asked_vectors = np.stack([encoder.encode([text])[0] for text in asked])
    embed_s = (time.perf_counter() - begin) / len(asked)
    vectors = encoder.encode(stored)
    stored_ids, asked_ids = encode(stored), encode(asked)
    rows = []
    for size in (size for size in sizes if size <= len(stored)):
        index = EmbeddingIndex(encoder, vectors[:size])
        seconds, keys = [], []
        for vector in asked_vectors:
            begin = time.perf_counter()
            keys.append(index.search(vector)[0])
            seconds.append(time.perf_counter() - begin)
        counts = _count(stored_ids[:size], asked_ids, keys)
        rows.append(
            NeighbourRow(size, **counts, embed_s=embed_s, search_s=float(np.median(seconds)))
        )
    return rows


def _count(
    stored: Sequence[TokenIds], asked: Sequence[TokenIds], keys: Sequence[int]
) -> dict[str, Any]:
    sorted_ids = sorted(map(_key, stored))
    whole = {_key(ids) for ids in stored}
    # [queries]: what could be shared and is, and by the rule r = k.
    best = np.array([longest_shared(sorted_ids, ids) for ids in asked])
    near = np.array([common_length(stored[k], ids) for k, ids in zip(keys, asked, strict=True)])
    best_whole = np.array([_longest_whole(whole, ids) for ids in asked])
    lengths = np.array([len(stored[key]) for key in keys])
    near_whole = np.where(near == lengths, near, 0)
    has_whole = best_whole > 0
    return {
        "queries": len(asked),
        "misses": float(np.mean(near < best)),
        "whole_prefixes": float(np.mean(has_whole)),
        "whole_misses": float(np.mean((near_whole < best_whole)[has_whole]))
        if any(has_whole)
        else 0.0,
        "tokens_lost": float(1 - near.sum() / max(best.sum(), 1)),
        "tokens_lost_whole": float(1 - near_whole.sum() / max(best.sum(), 1)),
    }


def longest_shared(sorted_ids: Sequence[bytes], ids: TokenIds) -> int:
    """Most tokens that any stored prompt shares: one of the two that sort beside it does."""
    key = _key(ids)
    place = bisect_left(sorted_ids, key)
    beside = sorted_ids[max(place - 1, 0) : place + 1]
    return max((common_length(np.frombuffer(other, ">u4"), ids) for other in beside), default=0)


def _longest_whole(stored: set[bytes], ids: TokenIds) -> int:
    key = _key(ids)
    return next((n for n in range(len(ids), 0, -1) if key[: 4 * n] in stored), 0)


def _key(ids: TokenIds) -> bytes:
    """Sorts as the ids do: most significant byte first."""
    return ids.astype(">u4").tobytes()
