"""The fields of a request, with the meaning that OpenAI and vLLM give them. Knows no rows' cells.

```
obeyed    temperature, n, logit_bias, ...     become fields of SamplingParams, or its rules
          response_format, ...                become what the answer must be
refused   suffix, echo, prompt_logprobs, ...  change the answer: refused, but for a neutral value
beside    user, metadata, store, ...          change no answer: left out
```

What goes to a chat template (`tools` and the like, see `chat_fields.py`) is refused by its name
here, and read before it is.

`tests/inputs/test_request_fields.py` holds OpenAI's and vLLM's fields against these.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from pipeline.constraints import REQUEST_FIELDS
from pipeline.generation import ROW_RULES
from pipeline.request_rules import REQUEST_RULES

LIMITS = ("max_new_tokens", "max_completion_tokens", "max_tokens", "max_output_tokens")
"""All of them mean `max_new_tokens`."""
_SAME = (
    "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "n", "best_of", "logprobs",
    "top_logprobs", *ROW_RULES, *REQUEST_RULES,
)  # fmt: skip
OBEYED: Mapping[str, str] = (
    dict.fromkeys(LIMITS, "max_new_tokens")
    | {n: n for n in _SAME}
    | dict.fromkeys(REQUEST_FIELDS, "constraint")
    | dict.fromkeys(("thinking_budget", "thinking_token_budget"), "thinking_budget")
)
"""Field of a request -> what `cells.read_fields` makes of it; two say how others
are meant, `top_logprobs` and `best_of`."""
BESIDE = frozenset(
    (
        "metadata", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls", "priority", "request_id", "cache_salt",
        "stream_options", "timeout", "detokenize", "return_token_ids",
        "return_token_offsets", "return_mm_kwargs", "return_prompt_text",
        "routed_experts_prompt_start", "session_id", "stream_interval",
        "output_kind", "flat_logprobs", "skip_clone", "skip_reading_prefix_cache",
        "output_text_buffer_length", "kv_transfer_params", "ec_transfer_params",
    )
)  # fmt: skip
"""Change no answer. (`chat_fields.py` refuses `parallel_tool_calls` where it forbids something.)"""
_EMPTY: tuple[object, ...] = ([], {}, "")
_USUAL: tuple[tuple[tuple[object, ...], tuple[str, ...]], ...] = (
    ((True,), (
        "add_generation_prompt", "add_special_tokens", "include_reasoning",
        "spaces_between_special_tokens",
    )),
    ((False,), (
        "continue_final_message", "early_stopping", "echo", "return_tokens_as_token_ids", "stream",
        "use_beam_search", "watermarking",
    )),
    ((0,), ("min_length", "prompt_logprob_start")),
    ((1,), ("beam_width", "length_penalty", "num_beams", "num_return_sequences")),
    (_EMPTY, (
        "audio", "chat_template", "chat_template_kwargs", "documents", "extra_args", "extra_body",
        "functions", "logits_processors", "logprob_token_ids", "media_io_kwargs",
        "mm_processor_kwargs", "prediction", "prompt_logprob_token_ids", "stop_sequences",
        "suffix", "system", "system_prompt", "tools", "trace_decode_token_ids", "vllm_xargs",
    )),
    ((), (
        "do_sample", "max_length", "prompt_embeds", "prompt_logprobs", "repetition_detection",
        "truncate_prompt_tokens", "web_search_options",
    )),
    (("left", "right"), ("truncation_side",)),
    (("none", "auto"), ("function_call", "tool_choice")),
    ((["text"],), ("modalities",)),
    (("none",), ("reasoning_effort",)),
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


def describe_unsupported(names: Iterable[str], unknown: Collection[str] = ()) -> str:
    """One sentence that names all of them; of fields that nobody knows only the number, and which
    known ones the first of them may have meant."""
    listed = sorted(names)
    others = f"{len(unknown)} field{'s' if len(unknown) > 1 else ''} that coppice does not know"
    near = [known for name in sorted(unknown)[:_GUESSED] for known in _nearest(name)]
    if near:
        others += f" (did you mean {', '.join(dict.fromkeys(near))}?)"
    said = ", ".join([*listed, *([others] if unknown else [])])
    return f"asks for {said}, which coppice cannot do; remove what is not needed"


_GUESSED = 4
"""Unknown fields of a row for which a known one is looked for."""
_LONGEST = 64
"""Characters of an unknown name that are compared: whoever wrote it chose its length."""


def _nearest(name: str) -> list[str]:
    """The field that is written almost so, if there is one."""
    return get_close_matches(name[:_LONGEST], OBEYED, n=1, cutoff=0.8)
