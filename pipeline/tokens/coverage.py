"""How much text one token can cover at most: what a long text's tokens can be counted by, roughly.

```
 text ─► normalizer ─► pre-tokenizer ─► model          no step may lose a character, and the model
         none shorter   none dropped     none unknown  must have a token for every byte
```

Where that holds, n characters make at least n / (characters of the longest token) tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.tokens.growth import steps_of

_FALLBACK_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_KEEPING = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"}
_ADDING = {"ByteLevel", "BertProcessing", "RobertaProcessing"}


def most_characters(backend: Tokenizer) -> int | None:
    """The most characters of a text that a token stands for; None: nothing is sure."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    normalizer, pieces = steps_of(backend.normalizer), steps_of(backend.pre_tokenizer)
    is_sure = (
        all(map(_keeps_length, normalizer))
        and all(map(_keeps_text, pieces))
        and all(map(_keeps_tokens, steps_of(backend.post_processor)))
        and backend.truncation is None
        and not any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
        and _knows_all_bytes(backend.model, vocabulary, [*normalizer, *pieces])
    )
    return max(map(len, vocabulary)) if is_sure else None


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        one: str = normalizer["pattern"].get("String", "  ")
        return len(one) == 1 and bool(normalizer["content"])
    return normalizer["type"] in ("Prepend", "ByteLevel")


def _keeps_text(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in _KEEPING


def _keeps_tokens(post_processor: dict[str, Any]) -> bool:
    if post_processor["type"] == "TemplateProcessing":
        return any("Sequence" in piece for piece in post_processor["single"])
    return post_processor["type"] in _ADDING


def _knows_all_bytes(model: Any, vocabulary: Collection[str], parts: list[dict[str, Any]]) -> bool:
    """Whether the model is a BPE that never meets what it has no token for."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix:
        return False
    if model.end_of_word_suffix or model.dropout:
        return False
    if any(part["type"] == "ByteLevel" for part in parts):
        return all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())
    return bool(model.byte_fallback) and all(byte in vocabulary for byte in _FALLBACK_BYTES)
