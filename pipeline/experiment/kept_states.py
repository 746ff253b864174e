"""Fill a KV store ahead of a job: compute and keep the states of given prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.audit.similarity import Encoder
from pipeline.errors import InputError
from pipeline.experiment.decode import GreedyDecoder
from pipeline.experiment.kept_prompts import KeptPrompt, read_kept_prompts
from pipeline.experiment.retrieval import keep_vectors
from pipeline.experiment.subjects import encode_texts
from pipeline.job.recycling import kv_identity
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.store import KVStore
from pipeline.model.folder import check_model_folder
from pipeline.model.identity import identify_model
from pipeline.model.model import load_model
from pipeline.model.shape import read_shape
from pipeline.settings import JobSettings
from pipeline.tokens.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Built:
    """`stored` of `prompts` were new, `tokens` computed; `refused`: there already, or no room."""

    prompts: int
    stored: int
    refused: int
    tokens: int
    bytes: int
    seconds: float


def build_store(path: Path, settings: JobSettings, say: Callable[[str], None]) -> Built:
    """Compute the prompts of a CSV or Parquet file and put them into `settings.recycle.kv_store`.

    Their sentence embeddings are kept beside them where an encoder is on this machine. Jobs of the
    same model, tokenizer and dtype find the states. Raises InputError for a prompt longer than the
    context, UsageError, ModelError, StorageError.
    """
    began = time.monotonic()
    folder = settings.recycle.kv_store
    assert folder is not None
    prompts = read_kept_prompts(path)
    check_model_folder(settings.model)
    tokenizer = PromptTokenizer.load(settings.model.model, settings.model.revision, settings.tokens)
    ids = encode_texts(tokenizer, [prompt.text for prompt in prompts])
    context = read_shape(settings.model.model, settings.model.revision).context_length
    _check_lengths(path, prompts, ids, context)
    loaded = load_model(settings.model)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    identity = kv_identity(settings, identify_model(settings.model), tokenizer.fingerprint, dtype)
    decoder = GreedyDecoder(loaded.model, 1)
    stored = tokens = 0
    with KVStore.open(folder, identity, settings.recycle.kv_store_budget) as store:
        for one in ids:
            if store.match(one) < len(one):
                stored += store.put(one, 0, decoder.compute_kv(one.tolist()))
                tokens += len(one)
    _keep_vectors(folder, prompts, say)
    size = loaded.shape.kv_bytes_per_token(dtype) * tokens
    seconds = time.monotonic() - began
    return Built(len(prompts), stored, len(prompts) - stored, tokens, size, seconds)


def _check_lengths(
    path: Path, prompts: list[KeptPrompt], ids: list[TokenIds], context: int | None
) -> None:
    for prompt, one in zip(prompts, ids, strict=True):
        if context is not None and len(one) > context:
            raise InputError(
                f"{path}: prompt {prompt.id} has {len(one):,} tokens, the model holds {context:,}; "
                "shorten it or remove it"
            )


def _keep_vectors(folder: Path, prompts: list[KeptPrompt], say: Callable[[str], None]) -> None:
    encoder = Encoder.load()
    if encoder is None:
        say("no sentence encoder is on this machine, so no embeddings are kept beside the states")
        return
    keep_vectors(folder, encoder, [prompt.text for prompt in prompts])
