"""What the plain model says with full attention: the answers and log-probs that others learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from pipeline.plan.documents import Reuse
from pipeline.segments.lessons import TrainingRow, group, make_lesson, predict

KEPT = 64
"""Of each answer token, how many of the most likely ones are kept."""


class Said(NamedTuple):
    """By answer token: the most likely tokens [n, kept] and their log-probs."""

    token_ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Difference:
    """Of a mode from full attention, over rows: mean KL a token in nats, share of rows with the
    same greedy answer, share of answer tokens that agree."""

    kl: float
    agreement: float
    top1: float


@torch.inference_mode()
def answer_greedily(
    model: Any, rows: Sequence[TrainingRow], max_new_tokens: int, most_tokens: int
) -> list[TrainingRow]:
    """The rows without an answer get the model's own, at full attention."""
    said: list[TrainingRow] = []
    stops = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=0
    )
    ends = set(stops if isinstance(stops, list) else [stops])
    for some in group(rows, most_tokens):
        open_rows = [TrainingRow(row.segments, [0]) for row in some]
        lesson = make_lesson(open_rows, None, model.device)
        ids, known = lesson.ids[:, :-1], (lesson.parts[:, :-1] >= 0).long()
        made = model.generate(ids, attention_mask=known, generation_config=config)
        for row, tokens in zip(some, made[:, ids.shape[1] :].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            said.append(row if row.answer else TrainingRow(row.segments, tokens[:end]))
    return said


@torch.inference_mode()
def listen(model: Any, rows: Sequence[TrainingRow], most_tokens: int) -> list[Said]:
    """By row, what the model says of each token of its answer, at full attention."""
    heard: list[Said] = []
    for some in group(rows, most_tokens):
        logits = predict(model, make_lesson(some, None, model.device), None)
        best = logits.log_softmax(-1).topk(min(KEPT, logits.shape[-1]))
        lengths = [row.num_learned for row in some]
        heard += map(Said, torch.split(best.indices, lengths), torch.split(best.values, lengths))
    return heard


def divergence(said: Said, logits: Tensor) -> Tensor:
    """KL(teacher || student) [n], in nats; all but the kept tokens count as one."""
    ours = logits.log_softmax(-1).gather(1, said.token_ids)
    probs = said.log_probs.exp()
    rest, rest_ours = (
        (1 - x.exp().sum(1)).clamp(min=1e-7, max=1.0) for x in (said.log_probs, ours)
    )
    left = rest * (rest.log() - rest_ours.log())
    divergence: Tensor = (probs * (said.log_probs - ours)).sum(1) + left
    return divergence


class Student(NamedTuple):
    """A way to compute rows: how documents are reused (None: at full attention), soft rows, and
    how many tokens at a time."""

    model: Any
    reuse: Reuse | None
    rows: Tensor | None
    most_tokens: int


@torch.inference_mode()
def compare(student: Student, rows: Sequence[TrainingRow], said: Sequence[Said]) -> Difference:
    """Of a student from what was said at full attention. It is given those answers, so that a row
    whose tokens all agree has the same greedy answer."""
    kls, top1, agree, heard = [], [], [], iter(said)
    for some in group(rows, student.most_tokens):
        lesson = make_lesson(some, student.reuse, student.model.device)
        logits = predict(student.model, lesson, student.rows)
        wanted = join([next(heard) for _ in some])
        kls.append(divergence(wanted, logits))
        top1.append(logits.argmax(-1) == wanted.token_ids[:, 0])
        by_row = torch.split(top1[-1], [row.num_learned for row in some])
        agree += [bool(same.all()) for same in by_row]
    kl, same = torch.cat(kls), torch.cat(top1)
    return Difference(float(kl.mean()), sum(agree) / len(agree), float(same.float().mean()))


def join(said: Sequence[Said]) -> Said:
    """Those of several rows as one."""
    return Said(*(torch.cat(parts) for parts in zip(*said, strict=True)))
