"""The study: every arm on the same rows, what it gets right and what it costs.

Dependence comes first: how much worse the untouched model answers when documents do not see each
other. A task below 30 points is void, for nothing can be mended in it. Then adapters are trained,
anew for each seed, and all is written into one folder.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.divergence import divergence
from pipeline.errors import ModelError
from pipeline.plan.documents import Ids
from pipeline.segments.arms import Arm, Costs, Rows, encoding_cost, full, mode, untrained_arms
from pipeline.segments.assembled import Assembler
from pipeline.segments.lessons import TrainingRow
from pipeline.segments.study_page import render
from pipeline.segments.tasks import (
    MOST_DOCUMENTS,
    TASKS,
    VOCABULARY,
    Exam,
    Row,
    Task,
    draw_exam,
    draw_row,
)
from pipeline.segments.train_links import LinkSettings, train_links
from pipeline.segments.train_packet import PacketSettings, draw_rows, train_packet
from pipeline.storage.durable import replace_file

_AT_ONCE = 100  # rows
_LEAST_DOCUMENTS = 3
PACKETS = (1, 4, 8)
LINKS = (0, 1, 5)


@dataclass(frozen=True)
class StudySettings:
    """`rows`: of each task and seed. `training_rows`, of which `held_out` are not learned from,
    `link_steps` and `packet_epochs`: of each training."""

    model: Path
    output: Path
    rows: int = 667
    seeds: int = 3
    training_rows: int = 576
    held_out: int = 64
    link_steps: int = 300
    packet_epochs: int = 5

    def quick(self) -> StudySettings:
        """So little that nothing should be quoted."""
        return replace(
            self, rows=30, seeds=1, training_rows=64, held_out=16, link_steps=3, packet_epochs=1
        )


@dataclass(frozen=True)
class Measured:
    """One arm on one task, means over the rows of one seed. `own`, `encoded`: tokens; `mflops`:
    with the question, and apart from it of encoding the documents once."""

    arm: str
    task: Task
    seed: int
    rows: int
    exact: float
    kl: float
    top1: float
    own: float
    prompt: float
    mflops: float
    encoding_mflops: float
    copies: bool


@dataclass(frozen=True)
class Subject:
    """An arm with the model, and the soft rows, that it runs with; `soft_tokens` before and after
    a document."""

    arm: Arm
    assembler: Assembler
    soft_tokens: int = 0


def run_study(settings: StudySettings, say: Callable[[str], None]) -> Path:
    """Measure all arms; the page, which is written anew after each seed. Raises ModelError for
    another model than the study's."""
    began = time.monotonic()
    model = load_study_model(settings.model)
    exams = {seed: _draw_rows(seed, settings.rows) for seed in range(1, settings.seeds + 1)}
    found: list[Measured] = []
    facts: list[dict[str, Any]] = []
    for seed, rows in exams.items():
        plain = Assembler(model)
        arms = {name: Subject(arm, plain) for name, arm in untrained_arms(seed).items()}
        found += _measure(arms, plain, rows, seed)
        say(f"seed {seed}: {len(arms)} arms without training, {time.monotonic() - began:.0f} s")
    for task in TASKS:
        say(f"dependence of {task}: {_dependence(found, task):+.3f}")
    page = settings.output / "summary.md"
    for seed, rows in exams.items():
        arms = dict(_train_all(model, settings, seed, facts, say))
        found += _measure(arms, Assembler(model), rows, seed)
        say(f"seed {seed}: {len(arms)} trained arms, {time.monotonic() - began:.0f} s")
        content = {
            "settings": {name: str(value) for name, value in asdict(settings).items()},
            "layers": model.config.num_hidden_layers,
            "kv_bytes_per_token": _kv_bytes(model),
            "seconds": round(time.monotonic() - began),
            "training": facts,
            "measured": [asdict(one) for one in found],
        }
        found_json = (json.dumps(content, indent=1) + "\n").encode()
        replace_file(settings.output / "study.json", found_json)
        replace_file(page, render(content).encode())
    return page


def load_study_model(folder: Path) -> Any:
    """The model in float32. Raises ModelError where it is another than the tasks are for."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the study's model cannot be loaded from there") from error
    if model.config.model_type != "llama" or model.config.vocab_size != VOCABULARY:
        raise ModelError(f"{folder} is not the study's model; leave --model out")
    model.eval()
    return model


def _draw_rows(seed: int, count: int) -> dict[Task, list[Row]]:
    drawn: dict[Task, list[Row]] = {}
    for task in TASKS:
        rng = random.Random(f"study-{task}-{seed}")
        spread = MOST_DOCUMENTS - _LEAST_DOCUMENTS + 1
        drawn[task] = [draw_row(task, rng, _LEAST_DOCUMENTS + i % spread) for i in range(count)]
    return drawn


def as_segments(row: Row | Exam) -> list[Ids]:
    """Ids of preamble, documents and question."""
    return [np.array(ids, np.int64) for ids in (row.preamble, *row.documents, row.question)]


def _measure(
    subjects: dict[str, Subject], plain: Assembler, rows: dict[Task, list[Row]], seed: int
) -> list[Measured]:
    """Each arm on all tasks, against full attention of the untouched model."""
    costs = Costs.of(plain.model)
    found = []
    for task, some in rows.items():
        by_arm: dict[str, list[Tensor]] = {name: [] for name in subjects}
        for first in range(0, len(some), _AT_ONCE):
            batch = some[first : first + _AT_ONCE]
            segments: Rows = [as_segments(row) for row in batch]
            answers = torch.tensor([row.answer[0] for row in batch])
            expected = full(plain, segments).logits.log_softmax(-1)
            for name, subject in subjects.items():
                by_arm[name].append(_score(subject, segments, answers, expected, costs))
        for name, parts in by_arm.items():
            exact, kl, top1, own, prompt, flops, encoding, copies = (
                torch.cat(parts).mean(0).tolist()
            )
            found.append(
                Measured(name, task, seed, len(some), exact, kl, top1, own, prompt, flops / 1e6,
                         encoding / 1e6, bool(copies))
            )  # fmt: skip
    return found


def _score(
    subject: Subject, segments: Rows, answers: Tensor, expected: Tensor, costs: Costs
) -> Tensor:
    """[rows, 8]: the numbers of `Measured`, in its order."""
    outcome = subject.arm(subject.assembler, segments)
    said = outcome.logits.log_softmax(-1)
    best = said.argmax(-1)
    kl = divergence(expected, said)
    columns = [
        best == answers, kl, best == expected.argmax(-1), outcome.own,
        torch.tensor([sum(map(len, row)) for row in segments]),
        costs.flops(outcome.own, outcome.seen),
        costs.flops(*encoding_cost(segments, subject.soft_tokens)),
        torch.full_like(kl, outcome.copies),
    ]  # fmt: skip
    return torch.stack([column.float() for column in columns], 1)


def _train_all(
    model: Any, settings: StudySettings, seed: int, facts: list[dict[str, Any]],
    say: Callable[[str], None],
) -> Iterator[tuple[str, Subject]]:  # fmt: skip
    """Every arm that is trained, by its name."""
    rng = random.Random(f"study-training-{seed}")
    count = settings.training_rows
    mixed, local = (_draw_training(rng, tasks, count) for tasks in (TASKS, ("local",)))
    packet = PacketSettings(
        rows=count, held_out=settings.held_out, epochs=settings.packet_epochs, batch=32,
        learning_rate=1e-3, seed=seed,
    )  # fmt: skip
    asked = [(f"packet {m}", mixed, m) for m in PACKETS] + [("packet 4 of local rows", local, 4)]
    for name, rows, tokens in asked:
        done = train_packet(model, rows, replace(packet, soft_tokens=tokens), lambda _: None)
        facts.append(_fact(name, seed, done) | {"epochs": done.epochs})
        say(f"seed {seed}: {name}: held-out KL {done.before.kl:.3f} to {done.after.kl:.3f}")
        yield name, _packet(model, done.rows, tokens)
    draw = torch.Generator().manual_seed(seed)
    yield "packet 4 untrained", _packet(model, draw_rows(model, 8, draw), 4)
    links = LinkSettings(
        plain_share=0.25, steps=settings.link_steps, held_out=settings.held_out, batch=16,
        learning_rate=1e-3, seed=seed,
    )  # fmt: skip
    for tokens in LINKS:
        trained = copy.deepcopy(model)
        linked = train_links(trained, mixed, replace(links, soft_tokens=tokens), lambda _: None)
        facts.append(_fact(f"KVLink{tokens}", seed, linked) | {"drift": linked.drift})
        say(f"seed {seed}: KVLink{tokens}: KL {linked.before.kl:.3f} to {linked.after.kl:.3f}")
        arm = mode("kvlink", False, soft_tokens=tokens)
        yield f"KVLink{tokens}", Subject(arm, Assembler(trained, linked.rows))
    alone = replace(links, soft_tokens=5, is_frozen=True, learning_rate=1e-2)
    linked = train_links(model, mixed, alone, lambda _: None)
    facts.append(_fact("5 links only", seed, linked))
    arm = mode("kvlink", False, soft_tokens=5)
    yield "5 links only", Subject(arm, Assembler(model, linked.rows))
    trained = copy.deepcopy(model)
    control = train_links(
        trained, mixed, replace(links, soft_tokens=0, plain_share=1.0), lambda _: None
    )
    facts.append(_fact("same steps, full mask", seed, control) | {"drift": control.drift})
    yield "same steps, full mask: full", Subject(full, Assembler(trained))
    yield "same steps, full mask: concat", Subject(mode("concat", False), Assembler(trained))


def _packet(model: Any, rows: Tensor, soft_tokens: int) -> Subject:
    arm = mode("packet", False, soft_tokens=soft_tokens)
    return Subject(arm, Assembler(model, rows), soft_tokens)


def _draw_training(rng: random.Random, tasks: Sequence[Task], count: int) -> list[TrainingRow]:
    rows = []
    for _ in range(count):
        exam = draw_exam(rng, rng.randint(_LEAST_DOCUMENTS, MOST_DOCUMENTS), tasks)
        rows.append(TrainingRow(as_segments(exam), exam.answer, exam.learned))
    return rows


def _fact(name: str, seed: int, done: Any) -> dict[str, Any]:
    """Of a training: held-out divergence and agreement, before and after."""
    return {"arm": name, "seed": seed, "before": asdict(done.before), "after": asdict(done.after)}


def _dependence(found: Sequence[Measured], task: Task) -> float:
    exact = {
        arm: [one.exact for one in found if (one.arm, one.task) == (arm, task)]
        for arm in ("full", "concat")
    }
    return float(np.mean(exact["full"]) - np.mean(exact["concat"]))


def _kv_bytes(model: Any) -> int:
    config = model.config
    head_dim = model.base_model.layers[0].self_attn.head_dim
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4)
