"""The fields of a request, with the meaning that OpenAI and vLLM give them. Knows no rows' cells.

```
 obeyed    temperature, min_p, ...           become fields of SamplingParams, or its rules
 refused   n, tools, response_format, ...    change the answer: refused, but for a neutral value
 beside    user, metadata, store, ...        change no answer: left out
```
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from pipeline.generation import ROW_RULES

LIMITS = ("max_new_tokens", "max_completion_tokens", "max_tokens", "max_output_tokens")
"""All of them mean `max_new_tokens`."""
_SAME = ("temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", *ROW_RULES)
OBEYED: Mapping[str, str] = dict.fromkeys(LIMITS, "max_new_tokens") | {n: n for n in _SAME}
"""Field of a request -> what `resolve_sampling` takes."""
BESIDE = frozenset(
    (
        "metadata", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls", "priority", "request_id", "cache_salt",
        "stream_options", "timeout", "detokenize", "return_token_ids",
        "return_tokens_as_token_ids",
    )
)  # fmt: skip
"""Change no answer. (`parallel_tool_calls` says how tools are called, and tools are refused.)"""
_EMPTY: tuple[object, ...] = ([], {}, "")
_USUAL: tuple[tuple[tuple[object, ...], tuple[str, ...]], ...] = (
    ((True,), (
        "add_generation_prompt", "add_special_tokens", "skip_special_tokens",
        "spaces_between_special_tokens",
    )),
    ((False,), (
        "continue_final_message", "early_stopping", "echo", "include_stop_str_in_output", "stream",
        "use_beam_search",
    )),
    ((0,), (
        "frequency_penalty", "min_length", "min_tokens", "presence_penalty", "prompt_logprobs",
        "top_logprobs",
    )),
    ((1,), (
        "beam_width", "best_of", "length_penalty", "n", "num_beams", "num_return_sequences",
    )),
    (_EMPTY, (
        "allowed_token_ids", "audio", "bad_words", "chat_template", "chat_template_kwargs",
        "documents", "extra_body", "functions", "guided_choice", "guided_grammar", "guided_json",
        "guided_regex", "logit_bias", "logits_processors", "prediction", "stop_sequences",
        "stop_token_ids", "structured_outputs", "suffix", "system", "system_prompt", "tools",
    )),
    ((), ("do_sample", "max_length", "truncate_prompt_tokens", "web_search_options")),
    (("none", "auto"), ("function_call", "tool_choice")),
    ((False, 0), ("logprobs",)),
    ((["text"],), ("modalities",)),
    (("none",), ("reasoning_effort",)),
    (({"type": "text"}, *_EMPTY), ("response_format",)),
    (({"type": "disabled"}, *_EMPTY), ("thinking",)),
    (("medium",), ("verbosity",)),
)  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    name: values for values, names in _USUAL for name in names
}
REFUSED = frozenset(_NEUTRAL)
"""Change the answer in a way that coppice cannot do."""
AMBIGUOUS = frozenset(
    (
        "audio", "do_sample", "documents", "echo", "extra_body", "functions", "max_length",
        "min_length", "modalities", "n", "num_return_sequences", "prediction", "stop_sequences",
        "stream", "suffix", "system", "system_prompt", "thinking", "verbosity",
    )
)  # fmt: skip
"""Names that a column of a table may have without being a field of a request."""


def is_neutral(name: str, value: object) -> bool:
    """Whether a field of `REFUSED` says what holds anyway; true is not taken for 1.

    Objects and lists may be JSON text, as a column of a table has them.
    """
    said = _without_nulls(_parsed(value))
    return said is None or any(
        said == usual and isinstance(said, bool) == isinstance(usual, bool)
        for usual in _NEUTRAL[name]
    )


def _parsed(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: inner for name, inner in value.items() if inner is not None}
    return value


def describe_unsupported(names: Iterable[str], num_unknown: int = 0) -> str:
    """One sentence that names all of them; of fields that nobody knows only the number."""
    listed = sorted(names)
    others = f"{num_unknown} field{'s' if num_unknown > 1 else ''} that coppice does not know"
    said = ", ".join([*listed, *([others] if num_unknown else [])])
    return f"asks for {said}, which coppice cannot do; remove what is not needed"
