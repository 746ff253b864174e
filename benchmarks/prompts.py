"""Prompts as token ids: made up with a known amount of sharing, or out of the workload files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams

Prompts = list[list[int]]


def shared_prompts(
    rows: int, shared: int, own: int, vocabulary_size: int, seed: int = 0
) -> Prompts:
    """`rows` prompts of random ids: `shared` tokens in common, then `own` of their own."""
    draw = np.random.default_rng(seed)
    prefix = draw.integers(0, vocabulary_size, shared).tolist()
    return [prefix + draw.integers(0, vocabulary_size, own).tolist() for _ in range(rows)]


def layered_prompts(
    rows: int, layers: list[tuple[int, int]], vocabulary_size: int, seed: int = 0
) -> Prompts:
    """`rows` prompts of random ids, shuffled. Of each layer (texts, tokens) a prompt has one text,
    and the texts take turns."""
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, vocabulary_size, layer).tolist() for layer in layers]
    order = draw.permutation(rows).tolist()
    return [[token for layer in texts for token in layer[row % len(layer)]] for row in order]


def growing_prompts(
    conversations: int, turns: int, tokens: tuple[int, int], vocabulary_size: int, seed: int = 0
) -> Prompts:
    """Every turn of conversations with the whole history, shuffled. `tokens`: first, each turn."""
    draw = np.random.default_rng(seed)
    first, more = tokens
    begin = draw.integers(0, vocabulary_size, first)
    prompts = []
    for _ in range(conversations):
        history = np.append(begin, draw.integers(0, vocabulary_size, more * turns))
        prompts += [history[: first + more * (turn + 1)].tolist() for turn in range(turns)]
    return [prompts[i] for i in draw.permutation(len(prompts))]


def distinct_prompts(
    rows: int, lengths: tuple[int, int], vocabulary_size: int, seed: int = 0
) -> Prompts:
    """`rows` prompts of random ids; lengths drawn from the half-open range `lengths`."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(*lengths, rows)
    return [draw.integers(0, vocabulary_size, size).tolist() for size in sizes]


def workload_prompts(path: Path) -> Prompts:
    """Token ids of a workload file, by the tokenizer beside it, shuffled with a fixed seed."""
    import polars as pl

    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    texts = pl.read_parquet(path, columns=["prompt"])["prompt"]
    encoded = tokenizer.encode_batch(texts.shuffle(seed=0).to_list(), add_special_tokens=False)
    return [e.ids for e in encoded]


def plan_prompts(
    prompts: Prompts, vocabulary_size: int, max_new_tokens: int, share: bool = True
) -> Plan:
    """Greedy plan that generates exactly `max_new_tokens` for every prompt.

    `share=False`: every prompt belongs to a tenant of its own, so that nothing is reused.
    """
    params = (SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True),)
    table = TokenTable.from_lists(prompts, vocabulary_size)
    ids = [str(i) for i in range(len(prompts))]
    tenant = None if share else np.arange(len(prompts))
    return build_plan(table, ids, params, np.zeros(len(prompts), np.int64), tenant)
