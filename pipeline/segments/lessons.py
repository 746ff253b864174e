"""Rows to learn from: one sequence each, under a mask that keeps documents apart.

```
 plain    P  d1  d2  Q  A           causal
 packet   P [H d1 T] [H d2 T] Q A   a packet sees itself; the rest sees everything before it
 kvlink   P  d1  l1  d2  l2  Q  A   a document sees itself; the rest, links too, all before it
```

Positions are those of the row throughout, which is the same as documents that were encoded alone
and moved. Sequences are padded on the left, so that answers end together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.verify.segment_reference import as_masks
from pipeline.errors import UsageError
from pipeline.plan.documents import MOST_LINKED, Ids, Reuse

_PADDING = -1  # the part that nothing but itself sees


class TrainingRow(NamedTuple):
    """`segments`: ids of preamble, documents and question; `answer`: what follows it; `learned`:
    which tokens of it are, None: all (others may be further questions)."""

    segments: list[Ids]
    answer: list[int]
    learned: list[bool] | None = None

    @property
    def num_learned(self) -> int:
        return len(self.answer) if self.learned is None else sum(self.learned)


@dataclass(frozen=True)
class Lesson:
    """ids, parts and positions [B, n]; `parts`: 0 what sees all, else the number of a document.
    `is_answer` [B, A] and `answers`: of the last A tokens, those of each row's that are learned."""

    ids: Tensor
    parts: Tensor
    positions: Tensor
    is_answer: Tensor

    @property
    def answers(self) -> Tensor:
        """[answer tokens], row by row."""
        return self.ids[:, -self.is_answer.shape[1] :][self.is_answer]


def make_lesson(rows: Sequence[TrainingRow], reuse: Reuse | None, device: Any) -> Lesson:
    """The rows as a mode of reuse lays them out; None: plain."""
    laid = [_lay_out(row.segments, reuse) for row in rows]
    lengths = [len(ids) + len(row.answer) for (ids, _), row in zip(laid, rows, strict=True)]
    most = max(len(row.answer) for row in rows)
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    parts, positions = torch.full_like(ids, _PADDING), torch.zeros_like(ids)
    is_answer = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        known, of_document = laid[i]
        ids[i, -length:] = torch.from_numpy(np.concatenate([known, row.answer]).astype(np.int64))
        parts[i, -length:] = 0
        parts[i, -length : ids.shape[1] - len(row.answer)] = torch.from_numpy(of_document)
        positions[i, -length:] = torch.arange(length)
        learned = torch.tensor(row.learned or [True] * len(row.answer))
        is_answer[i, most - len(row.answer) :] = learned
    return Lesson(*(x.to(device) for x in (ids, parts, positions, is_answer)))


def predict(model: Any, lesson: Lesson, soft_rows: Tensor | None) -> Tensor:
    """Logits [answer tokens, V], float32, that choose the learned tokens, row by row."""
    parts, width = lesson.parts, lesson.is_answer.shape[1]
    order = torch.arange(parts.shape[1], device=parts.device)
    age = (order[:, None] - order).expand(len(parts), -1, -1)
    same = parts[:, :, None] == parts[:, None]
    sees = (same | ((parts == 0)[:, :, None] & (parts != _PADDING)[:, None])) & (age >= 0)
    logits: Tensor = model(
        inputs_embeds=embed(model, lesson.ids, soft_rows),
        position_ids=lesson.positions,
        attention_mask=as_masks(model, age, sees),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits
    return logits[:, -width - 1 : -1][lesson.is_answer].float()


def embed(model: Any, ids: Tensor, soft_rows: Tensor | None) -> Tensor:
    """Embeddings [..., hidden]; ids from the vocabulary's size on are rows of `soft_rows`."""
    size = model.config.vocab_size
    embedded: Tensor = model.get_input_embeddings()(ids.clamp(max=size - 1))
    if soft_rows is None or not len(soft_rows):
        return embedded
    soft = soft_rows.to(embedded.dtype)[(ids - size).clamp(min=0)]
    return torch.where((ids >= size)[..., None], soft, embedded)


def group(rows: Iterable[TrainingRow], most_tokens: int) -> Iterator[list[TrainingRow]]:
    """The rows in their order, so many at a time that they are about `most_tokens` when padded."""
    gathered: list[TrainingRow] = []
    longest = 0
    for row in rows:
        longest_then = max(longest, count_tokens(row))
        if gathered and longest_then * (len(gathered) + 1) > most_tokens:
            yield gathered
            gathered, longest_then = [], count_tokens(row)
        gathered.append(row)
        longest = longest_then
    if gathered:
        yield gathered


def count_tokens(row: TrainingRow) -> int:
    """Of the plain row."""
    return sum(map(len, row.segments)) + len(row.answer)


def check_rows(rows: Sequence[TrainingRow], least: int) -> None:
    """Refuse rows that teach nothing. Raises UsageError."""
    if len(rows) < least:
        raise UsageError(
            f"there are {len(rows)} rows with documents, and training needs {least}; give more rows"
        )
    most = max(len(row.segments) - 2 for row in rows)
    if most > MOST_LINKED:
        raise UsageError(
            f"a row has {most} documents, and links are made for {MOST_LINKED}; leave such rows out"
        )


def fingerprint(rows: Sequence[TrainingRow]) -> str:
    """SHA-256 of all token ids."""
    digest = hashlib.sha256()
    for row in rows:
        for ids in (*row.segments, np.array(row.answer, np.int64)):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    return digest.hexdigest()


def document_tokens(rows: Sequence[TrainingRow]) -> list[int]:
    """Least, median and most of a document."""
    lengths = [len(document) for row in rows for document in row.segments[1:-1]]
    return [min(lengths), int(np.median(lengths)), max(lengths)]


def _lay_out(segments: list[Ids], reuse: Reuse | None) -> tuple[Ids, Ids]:
    """(ids of all before the answer, the part of each)."""
    preamble, *documents, question = segments
    pieces: list[tuple[Ids, int]] = [(preamble, 0)]
    for number, document in enumerate(documents):
        soft = np.arange(reuse.soft_tokens if reuse else 0)
        part = number + 1 if reuse else 0
        if reuse and reuse.mode == "packet":
            head = reuse.vocabulary_size + soft
            document = np.concatenate([head, document, head + reuse.soft_tokens])
        pieces.append((document, part))
        if reuse and reuse.mode == "kvlink":
            pieces.append((reuse.vocabulary_size + reuse.soft_tokens * number + soft, 0))
    pieces.append((question, 0))
    ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int64)
    return ids, np.repeat([part for _, part in pieces], [len(ids) for ids, _ in pieces])
