"""From jobs that wait to the tokens of one forward. Knows ranges and positions, not the model."""

from __future__ import annotations

import numpy as np

from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.packing import PackedBatch, Packer, Piece, pack_prefill

Chunk = tuple[PrefillJob, int, int]
"""Positions `[low, high)` of a job, to be computed in one forward."""


VIEWS_A_TOKEN = 8
"""Queries that a token may have before it counts as two: their results lie in memory side by side
until they are joined."""


def take_chunks(todo: list[PrefillJob], room: int) -> list[Chunk]:
    """At most `room` tokens from the end of `todo`; jobs that are taken to their end leave it."""
    taken: list[Chunk] = []
    while todo and room > 0:
        job = todo[-1]
        cost = 1 + len(job.place.documents.shifts) // VIEWS_A_TOKEN
        stop = min(job.end, job.done + max(1, room // cost))
        taken.append((job, job.done, stop))
        room -= (stop - job.done) * cost
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


def pack_chunks(chunks: list[Chunk], packer: Packer) -> PackedBatch:
    """One forward; a span's first chunk also copies the short shared edges that it absorbed."""
    pieces, copied, copies = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for job, low, high in chunks:
        place = job.place
        for part in place.pieces(low, high):
            ids = job.token_ids[part.low - place.start : part.high - place.start]
            seen = place.documents.at(part.position + len(ids) - 1)
            pieces.append(Piece(ids, part.position, part.slot, part.past, part.above, seen))
        if low == place.start > place.position:
            copied.append(place.copied_slots())
            copies.append(place.span.kv.start + np.arange(len(copied[-1])))
    return pack_prefill(pieces, (np.concatenate(copied), np.concatenate(copies)), packer)


def needs_logits(chunk: Chunk) -> bool:
    """Whether an output token is sampled from the chunk's last position: a row's first, or the one
    behind forced ones."""
    job, _, high = chunk
    if high < job.end:
        return False
    if isinstance(job.target, LiveRow):
        is_run = job.run is not None and job.target.over is None
        return is_run or not job.target.token_ids
    return job.target.span.unread > 0
