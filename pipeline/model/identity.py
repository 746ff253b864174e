"""What of a job decides its text: the fields of the fingerprint. Knows nothing about rows or plans.

Batch sizes, memory limits, the device and every path are left out: they may change between two
sessions of one job. A field that is here may not.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.conversation_settings import ConversationSettings
from pipeline.errors import ModelError
from pipeline.model.folder import find_model_folder
from pipeline.model.machine import num_threads
from pipeline.reuse_settings import ReuseSettings
from pipeline.sampling_settings import SamplingSettings
from pipeline.scoring_settings import ScoringSettings
from pipeline.settings import EngineSettings, JobSettings, ModelSettings

THREADS = "threads"
"""Of strict runs: how many threads share a product's sums decides their last bits."""
_WHOLE_FILES_BELOW = 1 << 30  # bytes of a model folder that are hashed completely
_MAX_HEADER = 100 << 20
_SAMPLED_BLOCKS = 512  # of each file: 2 MiB, a fraction of a second from a disk
_BLOCK_BYTES = 4096
_MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt")
_LATER_COLUMNS = ("segments_column", "documents_column", "json_schema_column")
_LATER = ("json_schema", "regex", "grammar", "thinking_budget",
          "n", "logprobs", "presence_penalty", "frequency_penalty")  # fmt: skip
"""Runs without any of these stay as they are."""
_PACKAGES = ("kvcoppice", "torch", "transformers", "tokenizers", "polars", "pyarrow", "numpy",
             "llguidance")  # fmt: skip


def fingerprint_fields(
    settings: JobSettings, model: Mapping[str, Any], hashes: Mapping[str, str], rules: str = ""
) -> dict[str, Any]:
    """The fingerprint as plain values; `settings` are those of the opened job.

    `model`: as of `identify_model`. `hashes`: of `input`, `tokenizer` and, if any, `adapter`.
    `rules`: of rows without fields of their own, see `pipeline/generation.py`.
    """
    return {
        "input": hashes["input"],
        **settings.read.model_dump(mode="json", exclude={"template", *_LATER_COLUMNS}),
        **settings.read.model_dump(include={*_LATER_COLUMNS}, exclude_none=True),
        "template": _hash_file(settings.read.template),
        **model,
        "tokenizer": hashes["tokenizer"],
        **settings.tokens.model_dump(include={"apply_chat_template", "parse_special_tokens"}),
        **_some("clock", settings.tokens.model_dump(mode="json")["clock"]),
        "system_prompt": _hash_text(settings.tokens.system_prompt),
        "sampling": _describe_sampling(settings.sampling),
        **_some("generation_options", settings.sampling.generation_options),
        **_some("generation_rules", rules),
        "dtype": settings.model.dtype,
        "engine": settings.model.engine,
        **_some("engine_options", settings.model.engine_options),
        "fidelity": settings.engine.fidelity,
        **_some(THREADS, _strict_threads(settings.engine)),
        "min_prefix_tokens": settings.plan.min_prefix_tokens,
        "on_overlong": settings.plan.on_overlong,
        **_describe_reuse(settings.reuse),
        **_some("adapter", hashes.get("adapter")),
        **_describe_conversations(settings.conversations),
        **_describe_scoring(settings.scoring),
        **_some("explode", settings.write.explode),
        "shard": f"{settings.plan.shard_number} of {settings.plan.num_shards}",
    }


def _describe_sampling(settings: SamplingSettings) -> dict[str, Any]:
    """Of what came later only what is said."""
    said = settings.model_dump(mode="json", exclude={"generation_options"})
    return {name: value for name, value in said.items() if name not in _LATER or value is not None}


def _describe_reuse(settings: ReuseSettings) -> dict[str, Any]:
    """Nothing where whole prompts share their beginnings, in the order in which they were given."""
    order = {} if settings.document_order == "given" else {"document_order": "best"}
    if not settings.moves_documents:
        return order
    return order | {
        "reuse": settings.reuse,
        "document_context": settings.context,
        **_some("epic_tokens", settings.num_epic_tokens),
        **_some("blend_share", settings.share_to_blend),
    }


def _describe_scoring(settings: ScoringSettings) -> dict[str, Any]:
    """Nothing where answers are generated; of questions the content of their file."""
    if not settings.scores:
        return {}
    said = settings.model_dump(mode="json", exclude={"questions", "question_order"})
    if settings.questions is None:
        return said
    order = {"question_order": settings.question_order}
    return said | order | {"questions": _hash_file(settings.questions)}


def _describe_conversations(settings: ConversationSettings) -> dict[str, Any]:
    """Nothing where rows have no turns; of a history that gives up nothing no more than columns."""
    if not settings.has_turns:
        return {}
    columns = settings.model_dump(include={"conversation_column", "turn_column"})
    if not settings.evicts:
        return columns
    return columns | {
        "evict": settings.evict,
        "budget_tokens": settings.budget_tokens,
        "evict_to": settings.evict_to,
        "evict_unit": settings.evict_unit,
        "positions": settings.positions,
        "on_full": settings.on_full,
        **_some("sink_tokens", settings.num_sink_tokens),
        **_some("gist_tokens", settings.num_gist_tokens),
    }


def _strict_threads(settings: EngineSettings) -> int | None:
    return (settings.threads or num_threads()) if settings.fidelity == "strict" else None


def _some(name: str, value: object) -> dict[str, Any]:
    """Runs without any stay as they are named."""
    return {name: value} if value else {}


def _hash_file(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _hash_text(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def identify_model(settings: ModelSettings) -> dict[str, Any]:
    """`model` and `revision`: a folder by the hash of its files, a hub id by its commit; `weights`
    where they are not held as they were saved."""
    weights = _some("weights", None if settings.weights == "auto" else settings.weights)
    folder = Path(settings.model)
    if folder.is_dir():
        return {"model": hash_model_folder(folder), "revision": None, **weights}
    snapshot = find_model_folder(settings)
    if snapshot is None:
        raise ModelError(
            f"model {settings.model!r} is neither a folder nor in the local hub cache; "
            "download it first or check the name"
        )
    # The cache keeps snapshots/<commit>/config.json, and a commit names the content of all files.
    return {"model": settings.model, "revision": snapshot.name, **weights}


def hash_model_folder(folder: Path) -> str:
    """sha256 over names, sizes and contents; of large models' weights the header and a sample.

    Models that were tuned from one another have the same header, so the sample is what tells them
    apart: blocks all over each file.
    """
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    total = sum(path.stat().st_size for path in files)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\x1f{path.stat().st_size}\x1f".encode())
        with path.open("rb") as stream:
            if path.suffix == ".safetensors" and total >= _WHOLE_FILES_BELOW:
                length = min(int.from_bytes(stream.read(8), "little"), _MAX_HEADER)
                digest.update(stream.read(length))
                for block in range(_SAMPLED_BLOCKS):
                    stream.seek(path.stat().st_size * block // _SAMPLED_BLOCKS)
                    digest.update(stream.read(_BLOCK_BYTES))
            else:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@cache
def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute; those not installed are left out. Do not
    change it."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
