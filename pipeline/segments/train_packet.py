"""KV Packet: soft tokens around every document, learned by a frozen model from itself.

The teacher is the model at full attention without them; the student sees packets that do not see
each other. No labels: the rows are the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.plan.documents import Reuse
from pipeline.segments.lessons import TrainingRow, check_rows, group, make_lesson, predict
from pipeline.segments.teacher import (
    Difference,
    Said,
    Student,
    answer_greedily,
    compare,
    divergence,
    join,
    listen,
)

INITIAL_SCALE = 0.02
_PATIENCE = 3  # epochs without a better held-out divergence


@dataclass(frozen=True)
class PacketSettings:
    """Published: 512 rows, at most 30 epochs of batches of 64, AdamW without decay, linear to 0.
    `most_tokens`: in one forward; it bounds memory, and changes results by rounding only."""

    soft_tokens: int = 8
    rows: int = 512
    held_out: int = 64
    epochs: int = 30
    batch: int = 64
    learning_rate: float = 1e-3
    max_new_tokens: int = 64
    most_tokens: int = 16_384
    seed: int = 0


class Trained(NamedTuple):
    """`rows` [R, hidden] float32; how far held-out rows were and are from full attention; `epochs`
    until the best; `used`: all rows with their answers."""

    rows: Tensor
    before: Difference
    after: Difference
    epochs: int
    used: list[TrainingRow]


def train_packet(
    model: Any, rows: Sequence[TrainingRow], settings: PacketSettings, say: Callable[[str], None]
) -> Trained:
    """The model is left as it was. Raises UsageError where the rows are too few."""
    check_rows(rows, 2 * settings.held_out)
    used = answer_greedily(
        model, rows[: settings.rows + settings.held_out], settings.max_new_tokens,
        settings.most_tokens,
    )  # fmt: skip
    held_out = used[: settings.held_out]
    said = listen(model, used, settings.most_tokens)
    draw = torch.Generator().manual_seed(settings.seed)
    reuse = Reuse("packet", model.config.vocab_size, False, soft_tokens=settings.soft_tokens)
    soft = draw_rows(model, reuse.soft_rows, draw).requires_grad_()
    student = Student(model, reuse, soft, settings.most_tokens)
    before = best = compare(student, held_out, said)
    kept, epochs = soft.detach().clone(), 0
    taught = list(zip(used, said, strict=True))[settings.held_out :]
    for epoch in _learn(student, taught, settings, draw):
        now = compare(student, held_out, said)
        say(f"epoch {epoch}: held-out KL {now.kl:.4f}, same answers {now.agreement:.3f}")
        if now.kl < best.kl:
            best, kept, epochs = now, soft.detach().clone(), epoch
        elif epoch - epochs >= _PATIENCE:
            break
    return Trained(kept.cpu(), before, best, epochs, used)


def draw_rows(model: Any, count: int, draw: torch.Generator) -> Tensor:
    """Untrained soft rows [count, hidden], float32, where the model is."""
    width = model.get_input_embeddings().embedding_dim
    return (torch.randn(count, width, generator=draw) * INITIAL_SCALE).to(model.device)


def _learn(
    student: Student, taught: list[tuple[TrainingRow, Said]], settings: PacketSettings,
    draw: torch.Generator,
) -> Iterator[int]:  # fmt: skip
    """Steps of AdamW on the student's rows; yields after each epoch, from 1 on."""
    soft = student.rows
    assert soft is not None
    optimizer = torch.optim.AdamW([soft], lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * -(-len(taught) // settings.batch)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(taught), generator=draw).tolist()
        for first in range(0, len(order), settings.batch):
            batch = [taught[i] for i in order[first : first + settings.batch]]
            soft.grad = _gradient(student, soft, batch)
            optimizer.step()
            falling.step()
        yield epoch + 1


def _gradient(student: Student, soft: Tensor, batch: list[tuple[TrainingRow, Said]]) -> Tensor:
    """Of the mean divergence over all answer tokens of the batch, for `soft` alone."""
    total, tokens = torch.zeros_like(soft), sum(row.num_learned for row, _ in batch)
    heard = iter(batch)
    for some in group((row for row, _ in batch), student.most_tokens):
        said = join([next(heard)[1] for _ in some])
        logits = predict(student.model, make_lesson(some, student.reuse, soft.device), soft)
        loss = divergence(said, logits).sum() / tokens
        total += torch.autograd.grad(loss, soft)[0]
    return total
