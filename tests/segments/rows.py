"""A tiny random Llama, and rows of the study's tasks for it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.plan.documents import Arrangement, Ids, Mode, Reuse, arrange
from pipeline.segments.tasks import VOCABULARY, Task, draw_row
from tests.engine import families
from tests.engine.families import FAMILIES

ALL = 10**6  # more tokens than a document has


def build_llama() -> Any:
    family = next(f for f in FAMILIES if f.id == "llama, grouped heads")
    config = family.config()
    config.vocab_size = VOCABULARY
    return families.build(config)


def draw_segments(count: int = 5, task: Task = "bridge-2") -> list[list[Ids]]:
    """Rows of 3 to 6 documents."""
    rng = random.Random(1)
    rows = [draw_row(task, rng, 3 + i % 4) for i in range(count)]
    return [
        [np.array(ids, np.int64) for ids in (row.preamble, *row.documents, row.question)]
        for row in rows
    ]


def arranged(rows: list[list[Ids]], mode: Mode, below: bool, **options: int) -> list[Arrangement]:
    reuse = Reuse(mode, VOCABULARY, below, **options)
    return [arrange(segments, reuse) for segments in rows]


def full_logits(model: Any, rows: list[list[Ids]]) -> Tensor:
    """At the last token of each row, by full prefill."""
    with torch.inference_mode():
        return torch.stack(
            [
                model(torch.from_numpy(np.concatenate(row))[None], use_cache=False).logits[0, -1]
                for row in rows
            ]
        )


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest logit."""
    return float((got - expected).abs().max() / expected.abs().max())
