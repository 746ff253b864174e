"""Find a tokenizer by folder or hub id and load it. Knows nothing about prompts.

Nothing of the repository is executed: no `trust_remote_code`, and chat templates run in a sandbox.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.tokens.growth import MOST_GROWTH, growth_of


def load_tokenizer(model: str, revision: str | None) -> Any:
    """A fast tokenizer of transformers, padding and truncation off.

    Raises ModelError if it is missing, partial, damaged, needs code of its own, or is not fast.
    """
    _check_folder(model)
    from transformers import AutoTokenizer  # seconds; not before a tokenizer is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    # The Rust parser raises bare Exception on a damaged tokenizer.json.
    except Exception as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ModelError(
            f"cannot load the tokenizer of {model} ({reason}); "
            "check --model and that the download is complete"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {model} has no tokenizer.json; convert it to a fast tokenizer first"
        )
    growth = growth_of(tokenizer.backend_tokenizer)
    if growth > MOST_GROWTH:
        raise ModelError(
            f"the tokenizer of {model} may make a text {growth:.1g} times as long, as no tokenizer "
            "does; take the model from its origin again"
        )
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _check_folder(model: str) -> None:
    """A path is refused here, before it could be taken for the name of a hub repository."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or model[:1] in (".", "~") or "\\" in model:
            raise ModelError(f"there is no model folder {model}; check --model")
        return
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not names & {"tokenizer.model", "vocab.json"}:
        raise ModelError(
            f"the model folder {model} holds no tokenizer.json; copy or download it completely"
        )
