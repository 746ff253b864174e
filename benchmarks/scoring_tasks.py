"""Requests with the lengths and the sharing of real evaluation tasks, as token ids.

Lengths are those that were counted on the real data (a 131k tokenizer), on average; the words are
sentences of the workload files, by the tokenizer beside them, each taken once before any comes
again. So what is shared is what the layout shares, and nothing else:

```
 shots (of the task, or drawn for each document) | question of the document | choices
```
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from kvcoppice.evaluation.evaluator import Request

_FILES = ("squad_passages", "gsm8k_8shot", "mt_bench")
_LEAST = 2  # tokens of a question or a choice


@dataclass(frozen=True)
class Layout:
    """Tokens of each part of a document, on average. `labels`: choices that are the same in every
    document; where there are none, `choices` of them with `choice` tokens. `draws_shots`: each
    document has shots of its own. `documents`: of one subject of the real task, or as many as take
    as long."""

    shots: int
    question: int
    labels: tuple[str, ...] = ()
    choices: int = 4
    choice: float = 0.0
    draws_shots: bool = False
    documents: int = 250


LAYOUTS = {
    "mmlu 5-shot": Layout(610, 93, (" A", " B", " C", " D")),
    "bbh 3-shot": Layout(380, 68, (" (A)", " (B)", " (C)", " (D)", " (E)")),
    "mmlu_continuation 5-shot": Layout(410, 48, choice=7.9),
    "hellaswag 10-shot": Layout(800, 26, choice=13.6, draws_shots=True, documents=25),
    "mmlu 0-shot": Layout(20, 93, (" A", " B", " C", " D")),
    "hellaswag 0-shot": Layout(0, 26, choice=13.6),
}


@dataclass(frozen=True)
class Task:
    """Requests document by document, as the harness asks them."""

    name: str
    documents: list[list[Request]]

    @property
    def requests(self) -> list[Request]:
        return [request for document in self.documents for request in document]

    def first(self, documents: int) -> Task:
        return Task(self.name, self.documents[:documents])

    @property
    def sent_tokens(self) -> int:
        """What a backend computes that shares nothing and is given every token."""
        return sum(len(r.context) + len(r.continuation) for r in self.requests)


class Words:
    """Ids of sentences in random order, handed out one after the other, round and round."""

    def __init__(self, workloads: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(workloads / "tokenizer.json"))
        sentences = set()
        for name in _FILES:
            for prompt in pl.read_parquet(workloads / f"{name}.parquet")["prompt"]:
                sentences.update(re.split(r"(?<=[.?!])\s+", prompt))
        texts = sorted(f" {sentence}" for sentence in sentences)
        random.Random(0).shuffle(texts)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        self._ids: Iterator[int] = cycle([i for one in encoded for i in one.ids])

    def take(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.array([next(self._ids) for _ in range(count)], np.uint32)

    def of(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


def make_task(name: str, words: Words, share: float = 1.0) -> Task:
    """`share` of the documents of its layout."""
    layout, draw = LAYOUTS[name], np.random.default_rng(0)

    def about(mean: float) -> int:
        return max(_LEAST, round(draw.gamma(6.0, mean / 6.0)))

    shots = words.take(layout.shots)
    labels = [words.of(label) for label in layout.labels]
    documents = []
    for _ in range(max(2, round(share * layout.documents))):
        if layout.draws_shots:
            shots = words.take(about(layout.shots))
        context = np.concatenate([shots, words.take(about(layout.question))])
        texts = labels or [words.take(about(layout.choice)) for _ in range(layout.choices)]
        documents.append([Request(context, text) for text in texts])
    return Task(name, documents)
