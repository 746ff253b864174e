"""A table for retrieval: questions over squad_passages, each with its best passages by BM25."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from benchmarks.prompts import Prompts, plan_prompts
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan
from pipeline.plan.segment_table import Segments

Rows = list[Prompts]
"""By row the ids of its preamble, its documents and its question."""

K1, B = 1.5, 0.75  # as Robertson and Zaragoza 2009 recommend


def bm25(passages: list[str], questions: list[str], best: int) -> list[list[int]]:
    """The numbers of the `best` passages for each question, the best first."""
    words = [re.findall(r"\w+", text.lower()) for text in passages]
    frequency = Counter(word for known in words for word in set(known))
    number = {word: i for i, word in enumerate(frequency)}
    count = np.zeros((len(passages), len(number)))
    for row, known in enumerate(words):
        for word in known:
            count[row, number[word]] += 1
    length = count.sum(1, keepdims=True)
    rare = np.log1p(
        (len(passages) - count.astype(bool).sum(0) + 0.5) / (count > 0).sum(0).clip(0.5)
    )
    weight = rare * count * (K1 + 1) / (count + K1 * (1 - B + B * length / length.mean()))
    found = []
    for question in questions:
        asked = [number[w] for w in set(re.findall(r"\w+", question.lower())) if w in number]
        found.append(np.argsort(-weight[:, asked].sum(1), kind="stable")[:best].tolist())
    return found


def squad_table(path: Path, passages_a_row: int, rows: int, seed: int = 0) -> Rows:
    """`rows` questions of the file in random order, by the tokenizer beside it; the separator
    before a passage belongs to it."""
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    prompts = pl.read_parquet(path, columns=["prompt"])["prompt"].to_list()
    parts = [re.split(r"\n\n(?=Context: |Question: )", prompt) for prompt in prompts]
    passages = sorted({context for _, context, _ in parts})
    questions = [question for *_, question in parts]
    random.Random(seed).shuffle(questions)
    questions = questions[:rows]

    def encode(texts: list[str]) -> Prompts:
        return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    documents = encode(["\n\n" + passage for passage in passages])
    asked = encode(["\n\n" + question for question in questions])
    preamble = encode([parts[0][0]])[0]
    return [
        [preamble, *(documents[number] for number in numbers), question]
        for numbers, question in zip(bm25(passages, questions, passages_a_row), asked, strict=True)
    ]


def plan_table(rows: Rows, vocabulary_size: int, new_tokens: int, reuse: Reuse | None) -> Plan:
    """`reuse` None: exact prefixes of the joined prompts."""
    prompts = [[i for part in row for i in part] for row in rows]
    plan = plan_prompts(prompts, vocabulary_size, new_tokens)
    if reuse is None:
        return plan
    segments = Segments.from_lists([[len(part) for part in row] for row in rows])
    return with_documents(plan, segments, reuse, np.zeros(len(rows), np.int64))
