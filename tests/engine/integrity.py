"""Whether what is reserved in an arena, and what is free, are all of it."""

from __future__ import annotations

from pipeline.engine.kv_cache import KVCache, KVRange


def check_integrity(cache: KVCache, ranges: list[KVRange]) -> None:
    """Assert that `ranges` and the gaps tile the arena exactly."""
    pieces = sorted(cache._free + [(r.start, r.stop) for r in ranges if r.length])
    edge = 0
    for low, high in pieces:
        assert low == edge < high, f"slots [{edge}, {low}) are lost or owned twice: {pieces}"
        edge = high
    assert edge == cache.capacity, f"slots [{edge}, {cache.capacity}) are lost: {pieces}"
