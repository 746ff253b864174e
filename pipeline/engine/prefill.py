"""From jobs that wait to the tokens of one forward. Knows ranges and positions, not the model."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.packing import PackedBatch, Piece, pack_prefill

Chunk = tuple[PrefillJob, int, int]
"""Positions `[low, high)` of a job, to be computed in one forward."""


def take_chunks(todo: list[PrefillJob], room: int) -> list[Chunk]:
    """At most `room` tokens from the end of `todo`; jobs that are taken to their end leave it."""
    taken: list[Chunk] = []
    while todo and room:
        job = todo[-1]
        stop = min(job.end, job.done + room)
        taken.append((job, job.done, stop))
        room -= stop - job.done
        job.done = stop
        if stop == job.end:
            todo.pop()
    return taken


def split_chunks(chunks: list[Chunk], num_tokens: int) -> tuple[list[Chunk], list[Chunk]]:
    """(the first `num_tokens` tokens of `chunks`, the others), in order."""
    first: list[Chunk] = []
    second: list[Chunk] = []
    room = num_tokens
    for job, low, high in chunks:
        cut = min(high, low + room)
        room -= cut - low
        if low < cut:
            first.append((job, low, cut))
        if cut < high:
            second.append((job, cut, high))
    return first, second


def pack_chunks(chunks: list[Chunk], kernel: AttentionKernel, device: torch.device) -> PackedBatch:
    """One forward; a span's first chunk also copies the short shared edges that it absorbed."""
    pieces, copied, copies = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for job, low, high in chunks:
        place, start = job.place, job.place.start
        ids = job.token_ids[low - start : high - start]
        slot = place.slots(low, high).start
        pieces.append(Piece(ids, low, slot, low - start, place.seen_before(start)))
        if low == start > place.position:
            copied.append(place.copied_slots())
            copies.append(place.span.kv.start + np.arange(len(copied[-1])))
    return pack_prefill(pieces, (np.concatenate(copied), np.concatenate(copies)), kernel, device)


def needs_logits(chunk: Chunk) -> bool:
    """Whether a first output token is sampled from the chunk's last position."""
    job, _, high = chunk
    if high < job.end:
        return False
    if isinstance(job.target, LiveRow):
        return not job.target.token_ids
    return job.target.span.unread > 0
