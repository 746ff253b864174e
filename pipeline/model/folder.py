"""Whether a model folder may be handed to other libraries. Knows files, opens no weight.

Tokenizer, config and weights are read by `transformers`, which follows links, believes sizes, and
fetches the code that a config names for its attention. So before it sees them: every file lies in
the folder, no size is absurd, no code is named, and no adapter stands in for the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.settings import ModelSettings

# Sizes above these are of no model; building one for them takes all memory or for ever.
_MOST = {
    "num_hidden_layers": 1_000, "n_layer": 1_000, "num_layers": 1_000,
    "num_attention_heads": 10_000, "n_head": 10_000, "num_key_value_heads": 10_000,
    "hidden_size": 1_000_000, "n_embd": 1_000_000, "intermediate_size": 10_000_000,
    "head_dim": 100_000, "vocab_size": 100_000_000, "num_experts": 10_000,
    "num_local_experts": 10_000, "max_position_embeddings": 1 << 40, "n_positions": 1 << 40,
}  # fmt: skip


def check_model_folder(settings: ModelSettings) -> None:
    """Raises ModelError for a link that leaves the folder, an adapter, a config that asks too much.

    A hub id is checked where the cache has it; what is not there is somebody else's to report.
    """
    folder = find_model_folder(settings)
    if folder is not None:
        _check_links(folder)
        if (folder / "adapter_config.json").exists():
            raise ModelError(f"{folder} holds an adapter; merge it into its model first")
        _check_config(folder)


def find_model_folder(settings: ModelSettings) -> Path | None:
    """Where the model's files are; None: of a hub id, nowhere on this machine."""
    folder = Path(settings.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(settings.model, "config.json", revision=settings.revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _check_links(folder: Path) -> None:
    """The hub's cache is made of links, from `snapshots/<commit>` to `blobs` beside it."""
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parents[1] / "blobs")
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(r) for r in roots):
            raise ModelError(
                f"{path} is a link to a place outside of the model's folder; copy the file into it"
            )


def _check_config(folder: Path) -> None:
    """Of config.json and what nests in it. One that is not JSON is refused where it is read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    left = [config]
    while left:
        fields = left.pop()
        if isinstance(fields, dict):
            left.extend(fields.values())
            reason = _why_refused(fields)
            if reason:
                raise ModelError(f"{folder}: config.json says {reason}; download it again")


def _why_refused(fields: dict[str, Any]) -> str | None:
    for name, most in _MOST.items():
        size = fields.get(name)
        # Anything but a number is refused by the configuration's own types.
        if isinstance(size, int | float) and not 0 <= size <= most:
            return f"{name} = {size}, which no model has"
    for name, value in fields.items():
        # A kernel of the hub, like org/name: code that would be fetched and run.
        if name.endswith("_implementation") and "/" in str(value):
            return f"{name} = {str(value)[:60]!r}, which is code of another repository"
    return None
