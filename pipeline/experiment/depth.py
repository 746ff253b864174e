"""Latency against reuse depth: how much of one long prompt comes from the store. Knows no files.

What is predicted of depth k is made of parts that are timed on their own, in the same rounds:

    (T_enc(m) + T_dec) / (T_enc(m - k) + T_dec + T_load(k))

T_enc(n) is a plain prefill of n tokens, T_load mapping and moving stored KV into a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineError, ModelError
from pipeline.experiment.decode import cache_of
from pipeline.experiment.experiment import Subject, keep_all, open_cold, open_to_read
from pipeline.experiment.finders import Finder, LongestPrefix, NoReuse
from pipeline.experiment.protocol import Protocol, median_interval, run_rounds, speedup_interval
from pipeline.kvstore.identity import TokenIds

_SEED = 932


@dataclass(frozen=True)
class DepthSettings:
    """A prompt of `prompt_tokens` tokens, of which `depths` come from the store; random ids."""

    prompt_tokens: int = 932
    depths: tuple[int, ...] = (0, 8, 32, 128, 512, 900)


class Span(NamedTuple):
    """Seconds of one run; of a probe, `total_s` alone."""

    total_s: float
    prefill_s: float = 0.0
    decode_s: float = 0.0
    token_ids: tuple[int, ...] = ()


Cell = tuple[str, int]
Spans = dict[Cell, list[Span]]


@dataclass(frozen=True)
class DepthStudy:
    """Spans by cell: (`baseline`, 0), (`warm` and `cold`, k), (`encode`, n), (`load`..., k)."""

    settings: DepthSettings
    num_new: int
    spans: Spans = field(repr=False)

    def seconds(self, kind: str, depth: int, part: str = "total_s") -> list[float]:
        """Of one cell, trial by trial."""
        return [getattr(span, part) for span in self.spans[kind, depth]]

    def median(self, kind: str, depth: int, part: str = "total_s") -> float:
        """Of one cell."""
        return float(np.median(self.seconds(kind, depth, part)))

    def encode_s(self, tokens: float) -> float:
        """T_enc(n): between the lengths that were probed, straight."""
        probed = sorted(n for kind, n in self.spans if kind == "encode")
        known = [(0, 0.0), *((n, self.median("encode", n)) for n in probed)]
        known.append((self.settings.prompt_tokens, self.median("baseline", 0, "prefill_s")))
        lengths, seconds = zip(*known, strict=True)
        return float(np.interp(tokens, lengths, seconds))

    def predicted_s(self, depth: int, load: str = "load") -> float:
        """Latency of a run that loads `depth` tokens: T_enc(m - k) + T_dec + T_load(k)."""
        load_s = self.median(load, depth) if depth else 0.0
        left = self.settings.prompt_tokens - depth
        return self.encode_s(left) + self.median("baseline", 0, "decode_s") + load_s

    def break_even(self, load: str = "load", extra_s: float = 0.0) -> float:
        """Depth k* in tokens below which loading (and `extra_s` of looking) costs more.

        A straight line through the load times of all depths, against T_enc(m) / m a token; infinite
        where a token is computed faster than it is loaded.
        """
        depths = [k for k in self.settings.depths if k]
        rate, fixed = np.polyfit(depths, [self.median(load, k) for k in depths], 1)
        gain = self.encode_s(self.settings.prompt_tokens) / self.settings.prompt_tokens - rate
        return max(1.0, (max(fixed, 0.0) + extra_s) / gain) if gain > 0 else float("inf")

    def alpha(self) -> float:
        """Least squares of S = alpha * k / m through the origin, over the warm depths."""
        shares = np.array([k / self.settings.prompt_tokens for k in self.settings.depths])
        base = self.median("baseline", 0)
        saved = np.array([1 - self.median("warm", k) / base for k in self.settings.depths])
        return float(shares @ saved / (shares @ shares))

    def rows(self) -> list[dict[str, Any]]:
        """One row a depth and state, for a table and a plot."""
        kinds = [("warm", k) for k in self.settings.depths]
        kinds += [cell for cell in self.spans if cell[0] == "cold"]
        return [self._row(kind, depth) for kind, depth in kinds]

    def _row(self, kind: str, depth: int) -> dict[str, Any]:
        latency = median_interval(self.seconds(kind, depth))
        speedup = speedup_interval(self.seconds("baseline", 0), self.seconds(kind, depth))
        base = self.median("baseline", 0)
        predicted = self.predicted_s(depth, "load" if kind == "warm" else "load-cold")
        return {
            "state": kind, "depth": depth, "prompt_tokens": self.settings.prompt_tokens,
            "new_tokens": self.num_new, "repeats": len(self.spans[kind, depth]),
            "baseline_s": base, "latency_s": latency.median, "latency_low_s": latency.low,
            "latency_high_s": latency.high, "speedup_percent": speedup.median,
            "speedup_low": speedup.low, "speedup_high": speedup.high,
            "ratio": base / latency.median, "predicted_s": predicted,
            "predicted_ratio": self.predicted_s(0) / predicted,
            "load_s": self.median("load", depth) if depth else 0.0,
            "load_cold_s": self.median("load-cold", depth) if depth else 0.0,
        }  # fmt: skip


def study_depth(
    subject: Subject, settings: DepthSettings, protocol: Protocol, folder: Path
) -> DepthStudy:
    """Time all depths in a store in `folder`. Raises EngineError where a token changed,
    ModelError for a context that is too small.
    """
    if settings.prompt_tokens + subject.decoder.num_new > subject.context:
        raise ModelError(
            f"{subject.name} holds {subject.context} tokens, and the study of depth wants "
            f"{settings.prompt_tokens} and {subject.decoder.num_new} new; name another --model"
        )
    vocabulary = subject.decoder.model.config.vocab_size
    draw = np.random.default_rng(_SEED)
    ids = draw.integers(0, vocabulary, settings.prompt_tokens).astype(np.uint32)
    for depth in settings.depths:
        if depth:  # a tenant each: prefixes of one another would be stored as one
            keep_all(subject, [ids[:depth]], folder, _tenant(depth))
    spans = run_rounds(_cells(subject, settings, ids, folder), protocol)
    expected = spans["baseline", 0][0].token_ids
    for (kind, depth), found in spans.items():
        if any(span.token_ids not in ((), expected) for span in found):
            raise EngineError(
                f"{subject.name}: {depth} recycled tokens ({kind}) changed an answer; "
                "none of these figures counts"
            )
    return DepthStudy(settings, subject.decoder.num_new, spans)


def _cells(
    subject: Subject, settings: DepthSettings, ids: TokenIds, folder: Path
) -> dict[Cell, Callable[[], Span]]:
    store = open_to_read(folder, subject.identity)
    deepest = max(settings.depths)
    cells: dict[Cell, Callable[[], Span]] = {
        ("baseline", 0): partial(_run, subject, NoReuse(), ids),
        ("cold", deepest): lambda: _run(subject, _cold(subject, folder, deepest), ids),
    }
    for depth in settings.depths:
        finder = LongestPrefix(store, _tenant(depth))
        cells["warm", depth] = partial(_run, subject, finder, ids)
        if depth:
            cells["load", depth] = partial(_load, subject, finder, ids)
            cells["load-cold", depth] = partial(_load_cold, subject, folder, depth, ids)
    for depth in sorted(settings.depths)[-2:]:
        left = settings.prompt_tokens - depth
        cells["encode", left] = partial(_encode, subject, ids[:left])
    return cells


def _run(subject: Subject, finder: Finder, ids: TokenIds) -> Span:
    begin = time.perf_counter()
    found = finder.find("", ids)
    done = subject.decoder.generate(ids.tolist(), found.kv)
    return Span(time.perf_counter() - begin, done.prefill_s, done.decode_s, done.token_ids)


def _load(subject: Subject, finder: LongestPrefix, ids: TokenIds) -> Span:
    begin = time.perf_counter()
    cache_of(finder.find("", ids).kv, subject.decoder.model.device)
    return Span(time.perf_counter() - begin)


def _load_cold(subject: Subject, folder: Path, depth: int, ids: TokenIds) -> Span:
    return _load(subject, _cold(subject, folder, depth), ids)


def _encode(subject: Subject, ids: NDArray[np.uint32]) -> Span:
    begin = time.perf_counter()
    subject.decoder.prefill(ids.tolist())
    return Span(time.perf_counter() - begin)


def _cold(subject: Subject, folder: Path, depth: int) -> LongestPrefix:
    return LongestPrefix(open_cold(folder, subject.identity), _tenant(depth))


def _tenant(depth: int) -> str:
    return f"depth {depth}"
