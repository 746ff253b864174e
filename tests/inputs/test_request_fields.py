"""Every field that OpenAI's and vLLM's requests have is obeyed, refused or known to do nothing.

The lists are those of OpenAI's API reference and of vLLM's `ChatCompletionRequest`,
`CompletionRequest` and `SamplingParams`, read in November 2026.
"""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.cells import read_fields
from pipeline.inputs.request_fields import (
    AMBIGUOUS,
    BESIDE,
    OBEYED,
    REFUSED,
    describe_unsupported,
    is_neutral,
)
from pipeline.request_rules import REQUEST_RULES

CONTENT = {"messages", "prompt", "model"}
OPENAI_CHAT = {
    "messages", "model", "audio", "frequency_penalty", "function_call", "functions", "logit_bias",
    "logprobs", "max_completion_tokens", "max_tokens", "metadata", "modalities", "n",
    "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key",
    "prompt_cache_retention", "reasoning_effort", "response_format", "safety_identifier", "seed",
    "service_tier", "stop", "store", "stream", "stream_options", "temperature", "tool_choice",
    "tools", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
}  # fmt: skip
OPENAI_TEXT = {
    "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs",
    "max_tokens", "n", "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix",
    "temperature", "top_p", "user",
}  # fmt: skip
VLLM_BOTH = {
    "use_beam_search", "top_k", "min_p", "repetition_penalty", "watermarking", "length_penalty",
    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
    "truncation_side", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "bad_words",
    "echo", "add_special_tokens", "response_format", "structured_outputs", "priority",
    "request_id", "session_id", "return_tokens_as_token_ids", "return_token_ids",
    "routed_experts_prompt_start", "return_token_offsets", "return_mm_kwargs", "cache_salt",
    "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "repetition_detection",
    "stream_interval", "thinking_token_budget",
}  # fmt: skip
VLLM_CHAT = {
    "include_reasoning", "add_generation_prompt", "continue_final_message", "documents",
    "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs",
    "return_prompt_text",
}  # fmt: skip
VLLM_TEXT = {"prompt_embeds"}
VLLM_SAMPLING = {
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens",
    "logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start",
    "logprob_token_ids", "flat_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind",
    "stream_interval", "skip_clone", "output_text_buffer_length", "structured_outputs",
    "logit_bias", "allowed_token_ids", "extra_args", "bad_words", "skip_reading_prefix_cache",
    "thinking_token_budget", "repetition_detection", "routed_experts_prompt_start",
    "trace_decode_token_ids",
}  # fmt: skip
EVERY = OPENAI_CHAT | OPENAI_TEXT | VLLM_BOTH | VLLM_CHAT | VLLM_TEXT | VLLM_SAMPLING


def test_every_field_has_one_place() -> None:
    places = [set(OBEYED), set(REFUSED), set(BESIDE), CONTENT]
    assert EVERY - set().union(*places) == set()
    assert {name for name in EVERY if sum(name in place for place in places) > 1} == set()
    assert {*REQUEST_RULES} <= OBEYED.keys()
    assert AMBIGUOUS <= REFUSED | OBEYED.keys()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": 3.0}, {"logprobs": 3}),
        ({"logprobs": 3, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": False, "top_logprobs": 0}, {"logprobs": False}),
        ({"top_logprobs": 0}, {}),
        ({"n": 4, "best_of": 4}, {"n": 4}),
        ({"best_of": 1}, {}),
        ({"logit_bias": {"5": -1, "6": None}}, {"logit_bias": {5: -1.0}}),
        ({"logit_bias": '{"5": 2}'}, {"logit_bias": {5: 2.0}}),
        ({"logit_bias": [("5", 2)]}, {"logit_bias": {5: 2.0}}),
        ({"stop_token_ids": [1, 2.0]}, {"stop_token_ids": [1, 2]}),
        ({"bad_words": "x"}, {"bad_words": ("x",)}),
        ({"presence_penalty": None}, {}),
    ],
)
def test_fields_mean_what_they_mean_there(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_fields(fields) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_logprobs": 5}, "top_logprobs is nothing without logprobs"),
        ({"logprobs": False, "top_logprobs": 5}, "top_logprobs is nothing without logprobs"),
        ({"logprobs": 2, "top_logprobs": 5}, "logprobs and top_logprobs differ"),
        ({"logprobs": True, "top_logprobs": 100}, r"top_logprobs must lie in \[0, 20\]"),
        ({"best_of": 4}, "best_of is 4 and n 1"),
        ({"best_of": 4, "n": 2}, "best_of is 4 and n 2"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"logit_bias": {"x": 1}}, "logit_bias: a token id must be a whole number"),
        ({"logit_bias": [5]}, "logit_bias must be an object"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list of token ids"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids must be a list of token ids"),
        ({"skip_special_tokens": 1}, "skip_special_tokens must be true or false"),
        ({"echo": True}, "asks for echo, which coppice cannot do"),
        ({"prompt_logprobs": 0}, "asks for prompt_logprobs"),
        ({"truncate_prompt_tokens": -1}, "asks for truncate_prompt_tokens"),
        ({"logprob_token_ids": [5], "watermarking": True}, "logprob_token_ids, watermarking"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCell, match=message):
        read_fields(fields)


def test_what_a_request_says_by_default_is_not_refused() -> None:
    """vLLM's client sends all of these."""
    usual = {
        "echo": False, "use_beam_search": False, "length_penalty": 1.0, "include_reasoning": True,
        "add_special_tokens": True, "spaces_between_special_tokens": True, "logprob_token_ids": [],
        "truncation_side": "left", "thinking_token_budget": -1, "watermarking": False,
    }  # fmt: skip
    assert all(name in OBEYED or is_neutral(name, value) for name, value in usual.items())
    assert read_fields(usual) == {}


def test_a_field_that_is_almost_one_is_guessed_and_never_quoted() -> None:
    """Seen red: `temprature` was "1 field that coppice does not know" and nothing else."""
    for name, known in (("temprature", "temperature"), ("max_token", "max_tokens")):
        said = describe_unsupported([], [name])
        assert f"(did you mean {known}?)" in said and name not in said.replace(known, "")
    assert "did you mean" not in describe_unsupported(["echo"], ["a secret of somebody"])
    assert "did you mean" not in describe_unsupported([], ["temprature" * 100_000])
