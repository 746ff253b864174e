"""Turns generated documents into batches of token ids with a mask of the tokens to learn.

Knows the curriculum's knobs; knows nothing about the model or how far training has come.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from corpus import TASKS, Item, Task, draw_topic
from layout import Segment, chat_document, draw_header, plain_document
from transformers import PreTrainedTokenizerFast

POOL_DOCUMENTS = 240  # sorted by length before they are cut into batches, to save padding


@dataclass(frozen=True)
class Level:
    """A level of the curriculum: how much a context holds, and which share of what is mixed in."""

    max_facts: int
    header_share: float
    chat_share: float
    repeat_share: float


REPEAT = "repeat"  # stands where the task stands, for documents of repeated random tokens

LEVELS = [
    Level(max_facts=2, header_share=0.0, chat_share=0.0, repeat_share=1.0),
    Level(max_facts=3, header_share=0.0, chat_share=0.1, repeat_share=0.3),
    Level(max_facts=6, header_share=0.2, chat_share=0.35, repeat_share=0.1),
    Level(max_facts=10, header_share=0.7, chat_share=0.4, repeat_share=0.05),
    Level(max_facts=14, header_share=0.85, chat_share=0.4, repeat_share=0.05),
]


@dataclass(frozen=True)
class Document:
    """Token ids, which of them are learned, and the task or REPEAT."""

    token_ids: list[int]
    learned: list[bool]
    task: str


@dataclass(frozen=True)
class Batch:
    """Padded documents: `learned[i, j]` says that token j of row i is to be predicted."""

    token_ids: torch.Tensor  # [rows, length]
    learned: torch.Tensor  # [rows, length], bool
    tasks: list[str]


def draw_segments(task: Task, level: Level, rng: random.Random) -> list[Segment]:
    """Return a document of one context, its items and all their questions."""
    topic = draw_topic(task, rng, rng.randint(2, level.max_facts), "known")
    # A record or a passage has many questions of its own; a ticket has only three.
    num_items = rng.randint(1, 5) if task == "classify" else 1
    items = [topic.draw_item(rng) for _ in range(num_items)]
    if topic.lookups:
        num_lookups = rng.randint(1, min(6, len(topic.lookups)))
        items.insert(0, Item("", tuple(rng.sample(topic.lookups, num_lookups))))
    header = draw_header(task, rng) if rng.random() < level.header_share else ""
    lay_out = chat_document if rng.random() < level.chat_share else plain_document
    return lay_out(header, topic, items, rng)


def encode_document(
    task: Task, level: Level, rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> Document:
    """Return the token ids of a document; the answers and their end tokens are learned."""
    segments = draw_segments(task, level, rng)
    encoded = tokenizer([segment.text for segment in segments])["input_ids"]
    token_ids: list[int] = []
    learned: list[bool] = []
    for segment, ids in zip(segments, encoded, strict=True):
        token_ids += ids
        learned += [segment.is_answer] * len(ids)
    return Document(token_ids, learned, task)


def repeated_document(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Document:
    """Return random tokens several times over: every word learns to be copied, known or not."""
    first = len(tokenizer.all_special_ids)  # special tokens have the first ids
    once = rng.sample(range(first, len(tokenizer)), rng.randint(3, 24))
    repeats = rng.randint(2, 4)
    learned = [False] * len(once) + [True] * (len(once) * (repeats - 1))
    return Document(once * repeats, learned, REPEAT)


def draw_document(level: Level, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Document:
    """Return a document of a random task, or of repeated random tokens."""
    if rng.random() < level.repeat_share:
        return repeated_document(rng, tokenizer)
    return encode_document(rng.choice(TASKS), level, rng, tokenizer)


def pad(documents: list[Document], padding_id: int) -> Batch:
    """Return documents as one batch, padded on the right."""
    shape = len(documents), max(len(document.token_ids) for document in documents)
    token_ids = torch.full(shape, padding_id)
    learned = torch.zeros(shape, dtype=torch.bool)
    for i, document in enumerate(documents):
        token_ids[i, : len(document.token_ids)] = torch.tensor(document.token_ids)
        learned[i, : len(document.learned)] = torch.tensor(document.learned)
    return Batch(token_ids, learned, [document.task for document in documents])


def iter_batches(
    level: Level, rng: random.Random, tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> Iterator[Batch]:
    """Yield batches of at most `batch_tokens` tokens without end, each of similar lengths."""
    while True:
        pool = [draw_document(level, rng, tokenizer) for _ in range(POOL_DOCUMENTS)]
        pool.sort(key=lambda document: len(document.token_ids))
        groups: list[list[Document]] = [[]]
        for document in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(document.token_ids) > batch_tokens:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        for group in groups:
            yield pad(group, tokenizer.pad_token_id)
