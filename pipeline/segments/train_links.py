"""KVLink: link tokens after every document, and a model that learns to read by them.

Cross-entropy of the answers, documents apart. Either all of the model is trained with the links, as
published, or the links alone (`is_frozen`), which nobody published. A share of the steps is made
without links at full attention, so that the model stays one that can read plain prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.plan.documents import MOST_LINKED, Reuse
from pipeline.segments.lessons import TrainingRow, check_rows, group, make_lesson, predict
from pipeline.segments.teacher import Difference, Student, answer_greedily, compare, listen
from pipeline.segments.train_packet import draw_rows

_SAID_EVERY = 50


@dataclass(frozen=True)
class LinkSettings:
    """Published: 6,000 steps of 64 rows, 5e-6 falling as a cosine, three fifths of the steps
    without documents. `soft_tokens` 0: the documents are apart, and nothing links them."""

    soft_tokens: int = 5
    is_frozen: bool = False
    plain_share: float = 0.6
    steps: int = 6000
    held_out: int = 64
    batch: int = 64
    learning_rate: float = 5e-6
    max_new_tokens: int = 64
    most_tokens: int = 16_384
    seed: int = 0


class Linked(NamedTuple):
    """`rows` [40 K, hidden] float32; how far held-out rows were and are from the untrained model at
    full attention; `drift`: share of their answer tokens that the model says otherwise than before
    at full attention; `used`: all rows with their answers."""

    rows: Tensor
    before: Difference
    after: Difference
    drift: float
    used: list[TrainingRow]


def train_links(
    model: Any, rows: Sequence[TrainingRow], settings: LinkSettings, say: Callable[[str], None]
) -> Linked:
    """Trains `model` in place, unless it is frozen; it must be float32 then. Rows without an answer
    learn the model's own. Raises UsageError where the rows are too few."""
    check_rows(rows, 2 * settings.held_out)
    used = answer_greedily(model, rows, settings.max_new_tokens, settings.most_tokens)
    held_out, taught = used[: settings.held_out], used[settings.held_out :]
    said = listen(model, held_out, settings.most_tokens)
    draw = torch.Generator().manual_seed(settings.seed)
    reuse = Reuse("kvlink", model.config.vocab_size, False, soft_tokens=settings.soft_tokens)
    soft = draw_rows(model, MOST_LINKED * settings.soft_tokens, draw).requires_grad_()
    linked = Student(model, reuse, soft, settings.most_tokens)
    plain = Student(model, None, None, settings.most_tokens)
    before = compare(linked, held_out, said)
    model.requires_grad_(not settings.is_frozen)
    trained = [soft] if settings.is_frozen else [soft, *model.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
    )
    share = 0.0 if settings.is_frozen else settings.plain_share
    for step in range(settings.steps):
        chosen = torch.randint(len(taught), (settings.batch,), generator=draw).tolist()
        is_plain = float(torch.rand((), generator=draw)) < share
        _add_gradients(plain if is_plain else linked, [taught[i] for i in chosen], trained)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        if step % _SAID_EVERY == _SAID_EVERY - 1:
            now = compare(linked, held_out, said)
            say(f"step {step + 1}: held-out KL {now.kl:.4f}, same answers {now.agreement:.3f}")
    model.requires_grad_(False)
    drift = 1 - compare(plain, held_out, said).top1
    return Linked(soft.detach().cpu(), before, compare(linked, held_out, said), drift, used)


def _add_gradients(student: Student, batch: list[TrainingRow], trained: Sequence[Tensor]) -> None:
    """Of the mean cross-entropy over all answer tokens of the batch."""
    tokens = sum(row.num_learned for row in batch)
    for some in group(batch, student.most_tokens):
        lesson = make_lesson(some, student.reuse, student.model.device)
        logits = predict(student.model, lesson, student.rows)
        loss = functional.cross_entropy(logits, lesson.answers, reduction="sum") / tokens
        made = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, made, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
