"""Who is tested: the embedded model, for answers, and DialoGPT-medium or its shape, for times."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.errors import ModelError
from pipeline.experiment.decode import GreedyDecoder
from pipeline.experiment.depth import DepthSettings
from pipeline.experiment.experiment import Subject
from pipeline.job.recycling import kv_identity
from pipeline.kvstore.identity import Identity, TokenIds
from pipeline.model.folder import check_model_folder
from pipeline.model.identity import identify_model
from pipeline.model.model import load_model
from pipeline.prompt_settings import TokenSettings
from pipeline.settings import JobSettings
from pipeline.tokens.tokenizer import PromptTokenizer

DIALOGPT: Final = "microsoft/DialoGPT-medium"
Tested = tuple[Subject, str]
"""A subject, and what a reader must know of it."""


@dataclass(frozen=True)
class Sizes:
    """How much is computed. `shape`: layers, heads, width of the model that is timed; its prompts
    have at most `longest` tokens, as the paper's are short; `new`... tokens follow each prompt."""

    shape: tuple[int, int, int] = (24, 16, 1024)
    vocabulary: int = 50257
    longest: int = 64
    new: int = 8
    new_answer: int = 12
    new_deep: int = 32
    depth: DepthSettings = DepthSettings()
    stored: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10000)
    queries: int = 200

    @classmethod
    def quick(cls) -> Sizes:
        """Seconds instead of minutes, and no figure worth quoting."""
        depth = DepthSettings(prompt_tokens=96, depths=(0, 8, 32, 64))
        return cls((2, 4, 64), 5000, new=4, new_deep=4, depth=depth, stored=(10, 30), queries=10)


def embedded_subject(demo: Path, sizes: Sizes) -> Tested:
    """The model that comes along. Its answers mean something; it is too small for times to."""
    subject = _real_subject(str(demo / "demo_model"), "embedded model", sizes.new_answer)
    return subject, (
        "3.1 million parameters, which really answer the longer of the prompts; the short ones are "
        "not of its kind, and what it says to them means nothing."
    )


def timing_subject(model: str | None, tokenizer: str, sizes: Sizes) -> Tested:
    """`model`, or DialoGPT-medium out of the hub's cache, or its shape with random weights.

    `tokenizer` is for random weights alone. Raises ModelError.
    """
    path = model or _cached(DIALOGPT)
    if path is None:
        return _random_subject(tokenizer, sizes)
    name = model or DIALOGPT
    subject = _real_subject(path, name, sizes.new, sizes.longest)
    return subject, f"Real weights; prompts of at most {sizes.longest} tokens."


def _cached(name: str) -> str | None:
    """The folder of a model in the hub's cache, if its weights are there as safetensors."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, file) for file in ("config.json", "model.safetensors")]
    config, weights = found
    return (
        str(Path(config).parent) if isinstance(config, str) and isinstance(weights, str) else None
    )


def _real_subject(model: str, name: str, num_new: int, longest: int | None = None) -> Subject:
    settings = JobSettings.from_flat({"model": model, "engine": "naive", "dtype": "float32"})
    check_model_folder(settings.model)
    loaded = load_model(settings.model)
    tokenizer = PromptTokenizer.load(model, None, TokenSettings())
    context = loaded.shape.context_length or 1 << 30
    ends = frozenset(loaded.shape.eos_token_ids)

    def read(token_ids: Sequence[int]) -> str:
        """The answer ends with the first end-of-text token, whatever follows."""
        end = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
        return tokenizer.decode_batch([token_ids[:end]])[0]

    return Subject(
        name=name,
        decoder=GreedyDecoder(loaded.model, num_new),
        encode=partial(encode_texts, tokenizer),
        read=read,
        identity=kv_identity(
            settings, identify_model(settings.model), tokenizer.fingerprint, "float32"
        ),
        context=context,
        longest=longest,
    )


def _random_subject(tokenizer: str, sizes: Sizes) -> Tested:
    """A GPT-2 that takes the time of a real one and says nothing, with always the same weights."""
    layers, heads, width = sizes.shape
    loaded = PromptTokenizer.load(tokenizer, None, TokenSettings())
    if loaded.vocabulary_size > sizes.vocabulary:
        raise ModelError(
            f"the tokenizer {tokenizer} has {loaded.vocabulary_size} entries, the model's shape "
            f"{sizes.vocabulary}; give --tokenizer a smaller one"
        )
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, vocab_size=sizes.vocabulary,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    named = hashlib.sha256(f"random weights, seed 0: {model.config.to_json_string()}".encode())
    layout = (layers, heads, width // heads)
    identity = Identity(named.hexdigest(), loaded.fingerprint, "float32", layout, "null")
    subject = Subject(
        name=f"GPT-2 of {layers} layers, width {width}, random weights",
        decoder=GreedyDecoder(model, sizes.new),
        encode=partial(encode_texts, loaded),
        read=None,
        identity=identity,
        context=model.config.n_positions,
        longest=sizes.longest,
    )
    return subject, (
        f"**Timing only**: {DIALOGPT} is not on this machine, so its weights are random and its "
        f"words mean nothing. Prompts of at most {sizes.longest} tokens; the tokenizer is not "
        "DialoGPT's, so prompts have more tokens than in the paper."
    )


def encode_texts(tokenizer: PromptTokenizer, texts: Sequence[str]) -> list[TokenIds]:
    """Token ids of whole prompts. Raises ModelError where the tokenizer makes none of one."""
    batch = tokenizer.encode_batch(list(texts))
    if batch.errors:
        row, reason = next(iter(batch.errors.items()))
        raise ModelError(f"prompt {row + 1} of {len(texts)} cannot be tokenised: {reason}")
    return np.split(batch.flat, np.cumsum(batch.lengths)[:-1])
