"""Which ids prompts become, as one number: two tokenizers with the same make the same ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.prompt_settings import TokenSettings

_NEW = ("chat_template_kwargs", "reasoning_tags")
_UNDECISIVE = {"chat_template", "clock", *_NEW}


def fingerprint_of(tokenizer: Any, template: str | None, settings: TokenSettings) -> str:
    """sha256 over all that decides which ids a prompt becomes, but the clock; `template`: the
    source of the one that is used."""
    decisive = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": template,
        "settings": settings.model_dump(mode="json", exclude=_UNDECISIVE),
    }
    for name in _NEW:  # runs without stay as they are named
        if getattr(settings, name) != TokenSettings.model_fields[name].default:
            decisive[name] = getattr(settings, name)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
