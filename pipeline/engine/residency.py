"""Which KV is on the device: every range that is reserved, and the spans that rows share.

What enters, gives way and stays is decided elsewhere (`policy`); here it is only done.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.engine.kv_cache import KVCache, KVRange
from pipeline.engine.spans import KVSpan, SharedPlacement, SharedSpan


class Residency:
    """`placed`: by key, the shared spans that some sequence still needs, resident or not."""

    def __init__(
        self, cache: KVCache, on_release: Callable[[SharedSpan], None] = lambda span: None
    ) -> None:
        """`on_release` is called with each shared span that is about to give its range back."""
        self.cache = cache
        self.placed: dict[int, SharedPlacement] = {}
        self._on_release = on_release
        self._ranges: set[KVRange] = set()

    @property
    def ranges(self) -> list[KVRange]:
        """Every range that is reserved now."""
        return list(self._ranges)

    def reserve(self, length: int, *, from_left: bool, reach: int = 0) -> KVRange:
        """A range of `length` slots, which must be free; the gaps are closed where none is wide.

        Whoever keeps slot numbers counts that as a change.
        """
        kv = self.cache.acquire(length, from_left=from_left, reach=reach)
        if kv is None:
            self.cache.compact(self.ranges)
            kv = self.cache.acquire(length, from_left=from_left, reach=reach)
        assert kv is not None, f"{length} slots wanted, {self.cache.free_tokens} free"
        if length:
            self._ranges.add(kv)
        return kv

    def free(self, kv: KVRange) -> None:
        self._ranges.discard(kv)
        self.cache.release(kv)

    def split(self, kv: KVRange, kept: list[tuple[int, int]]) -> list[KVRange]:
        """See `KVCache.split`."""
        self._ranges.discard(kv)
        parts = self.cache.split(kv, kept)
        self._ranges.update(parts)
        return parts

    def evict(self, span: SharedSpan) -> None:
        """Give the span's range back; it is computed again when it is needed."""
        self._on_release(span)
        self.free(span.kv)
        span.kv = KVRange(0, 0)

    def forget(self, span: SharedSpan) -> None:
        """Nobody will need the span again."""
        self.evict(span)
        del self.placed[span.key]

    def idle(self) -> list[SharedSpan]:
        spans = (placement.span for placement in self.placed.values())
        return [span for span in spans if span.is_resident and not span.live_rows]


def slots_of(spans: list[KVSpan] | list[SharedSpan]) -> int:
    """As many as these take when they are resident."""
    return sum(span.length for span in spans)
