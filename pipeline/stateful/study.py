"""The study: every arm on the same streams, what it still knows and how its cache fares."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.plan.conversations import Evictor
from pipeline.stateful.arms import BUDGETS, EVICTORS, Arm, all_arms
from pipeline.stateful.expected import Measured
from pipeline.stateful.found import Cell, Found, Share, age_class, quarter_of
from pipeline.stateful.streaming import Answered, Group, stream_arm
from pipeline.stateful.streams import (
    ANSWER,
    KINDS,
    STOP,
    VALUES,
    VOCABULARY,
    WINDOW,
    Kind,
    draw_lengths,
    draw_stream,
)
from pipeline.stateful.study_page import render
from pipeline.storage.durable import replace_file

_AT_ONCE = 50  # streams whose turns have the same lengths


@dataclass(frozen=True)
class StudySettings:
    """`windows`: length of a stream."""

    model: Path
    output: Path
    streams: int = 200
    windows: int = 4
    budgets: tuple[int, ...] = BUDGETS
    evictors: tuple[Evictor, ...] = EVICTORS
    seed: int = 1

    def quick(self) -> StudySettings:
        """So little that nothing should be quoted."""
        return replace(self, streams=10)


def run_study(settings: StudySettings, say: Callable[[str], None]) -> Path:
    """Measure all arms; the page. Raises ModelError for another model than the study's."""
    began = time.monotonic()
    model = load_study_model(settings.model)
    groups = _draw_groups(settings)
    arms = all_arms(settings.budgets, settings.evictors)
    found: list[Found] = []
    answers: dict[Arm, Tensor] = {}
    for number, arm in enumerate(arms, 1):
        one, answers[arm] = _measure(model, arm, groups, settings.seed)
        found.append(one)
        _write(settings, {"found": [asdict(one) for one in found]})
        say(f"{number} of {len(arms)}: {arm.name}: {one.share()}, {time.monotonic() - began:.0f} s")
    content: dict[str, Any] = {
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "turns": sum(len(group.streams) * len(group.streams[0]) for group in groups),
        "seconds": round(time.monotonic() - began),
        "same": [
            (arm.evictor, arm.keep, *_agree(answers[arm], answers[turned]))
            for arm in arms
            if (turned := replace(arm, positions="rerotate")) in answers and arm.positions == "gap"
            if arm.evictor != "gist" or arm.gist == arm.keep
        ],
        "found": [asdict(one) for one in found],
    }
    page = settings.output / "summary.md"
    _write(settings, content)
    replace_file(page, render(content["settings"], read_measured(content), content).encode())
    return page


def _write(settings: StudySettings, content: dict[str, Any]) -> None:
    replace_file(settings.output / "study.json", (json.dumps(content) + "\n").encode())


def read_measured(content: dict[str, Any]) -> Measured:
    """Of the study's JSON."""
    found = [Found.read(one) for one in content["found"]]
    same = {(evictor, keep): Share(hits, asked) for evictor, keep, hits, asked in content["same"]}
    return Measured({one.arm: one for one in found}, same)


def load_study_model(folder: Path) -> Any:
    """The model in float32. Raises ModelError where it is another than the streams are for."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the study's model cannot be loaded from there") from error
    known = model.config.model_type, model.config.vocab_size, model.config.max_position_embeddings
    if known != ("llama", VOCABULARY, WINDOW):
        raise ModelError(f"{folder} is not the study's model; leave --model out")
    model.eval()
    return model


def _draw_groups(settings: StudySettings) -> list[Group]:
    groups = []
    for first in range(0, settings.streams, _AT_ONCE):
        rng = random.Random(f"stateful-study-{settings.seed}-{first}")
        lengths = draw_lengths(rng, settings.windows * WINDOW)
        count = min(_AT_ONCE, settings.streams - first)
        groups.append(Group([draw_stream(rng, lengths) for _ in range(count)], first))
    return groups


def _measure(model: Any, arm: Arm, groups: Sequence[Group], seed: int) -> tuple[Found, Tensor]:
    """What was found of an arm, and the tokens of its answers beyond the first window."""
    began = time.monotonic()
    counts: dict[tuple[Kind, int, int], list[float]] = {}
    turns: list[Answered] = []
    later: list[Tensor] = []
    history: list[int] = []
    for group in groups:
        answered = stream_arm(model, arm, group, seed)
        _count(group, answered, counts)
        far = [one for end, one in zip(_ends(group), answered, strict=True) if end >= WINDOW]
        later += [one.token_ids.flatten() for one in far]
        history += [one.history for one in far]
        turns += answered
    cells = tuple(
        Cell(kind, age, quarter, int(asked), int(exact), int(malformed), int(repeated), nll)
        for (kind, age, quarter), (asked, exact, malformed, repeated, nll) in sorted(counts.items())
    )
    found = Found(
        arm.name, arm.evictor, arm.positions, arm.keep, cells,
        span=max(one.standing.span for one in turns),
        skew=max(one.standing.skew for one in turns),
        duplicates=max(one.standing.duplicate_positions for one in turns),
        runs=max(one.standing.runs for one in turns),
        history=sum(history) / max(1, len(history)),
        seconds=round(time.monotonic() - began, 2),
    )  # fmt: skip
    return found, torch.cat(later) if later else torch.zeros(0, dtype=torch.int64)


def _count(
    group: Group, answered: Sequence[Answered], counts: dict[tuple[Kind, int, int], list[float]]
) -> None:
    """Add the questions of a group to its cells."""
    before: list[list[int]] = [[] for _ in group.streams]
    for number, (end, one) in enumerate(zip(_ends(group), answered, strict=True)):
        said = one.token_ids.tolist()
        for row, stream in enumerate(group.streams):
            turn = stream[number]
            if turn.kind in KINDS:
                value, stop = said[row]
                cell = counts.setdefault(
                    (turn.kind, age_class(turn.age), quarter_of(end)), [0.0] * 5
                )
                is_whole = value in VALUES and stop == STOP
                is_right = is_whole and value == turn.fact.value
                added = (1, is_right, not is_whole, said[row] == before[row], float(one.nll[row]))
                cell[:] = [a + b for a, b in zip(cell, added, strict=True)]
        before = said


def _ends(group: Group) -> list[int]:
    """Where the question of each turn ends in the streams."""
    ends, place = [], 0
    for turn in group.streams[0]:
        place += len(turn.prompt)
        ends.append(place - 1)
        place += ANSWER
    return ends


def _agree(a: Tensor, b: Tensor) -> tuple[int, int]:
    """(answers that are the same, all)."""
    same = (a.view(-1, ANSWER) == b.view(-1, ANSWER)).all(1)
    return int(same.sum()), len(same)
