"""Fields of a request that become one text of a row's parameters: what is read is what was said."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.generation import resolve_sampling
from pipeline.records import SamplingParams
from pipeline.request_rules import NOTHING, REQUEST_RULES, read_asked, with_bad_words, write_asked
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import JobSettings

EACH: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": -2.0,
    "logit_bias": {"5": 1.5, "60": -100},
    "allowed_token_ids": [5, 6],
    "bad_words": ["x", "y z"],
    "min_tokens": 3,
    "stop_token_ids": [7],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}


def test_every_field_is_read_as_it_was_written_and_defaults_are_nothing() -> None:
    assert EACH.keys() == {*REQUEST_RULES}
    rules = read_asked(write_asked(EACH))
    for name, value in EACH.items():
        said = {int(k): v for k, v in value.items()} if name == "logit_bias" else value
        assert getattr(rules, name) == (tuple(said) if isinstance(said, list) else said)
        alone = read_asked(write_asked({name: value}))
        assert alone != NOTHING and getattr(alone, name) == getattr(rules, name)
    defaults = {n: v for n, v in NOTHING.model_dump().items() if n != "allowed_token_ids"}
    assert write_asked({}) == write_asked(defaults) == write_asked({"min_tokens": 0}) == ""
    with pytest.raises(ValueError, match="allowed_token_ids: allows no token"):
        write_asked({"allowed_token_ids": []})  # as vLLM has it: no answer could be
    assert write_asked(dict.fromkeys(EACH)) == ""
    assert read_asked("") is NOTHING


def test_one_text_stands_for_one_wish_however_it_is_written() -> None:
    one = write_asked({"logit_bias": {"5": 1}, "min_tokens": 2})
    other = write_asked({"min_tokens": 2, "presence_penalty": 0.0, "logit_bias": {5: 1.0}})
    assert one == other
    spelt = with_bad_words(write_asked({"bad_words": ["x"]}), ((4,), (5, 6)))
    assert read_asked(spelt).bad_words_ids == ((4,), (5, 6)) and read_asked(spelt).changes_logits
    assert not read_asked(write_asked({"bad_words": ["x"]})).changes_logits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty: input should be less than or equal to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: "),
        ({"presence_penalty": True}, "presence_penalty: must be a number, not true or false"),
        ({"logit_bias": {"x": 1}}, "logit_bias: "),
        ({"logit_bias": {"5": 101}}, "logit_bias: input should be less than or equal to 100"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: "),
        ({"allowed_token_ids": [1.5]}, "allowed_token_ids: "),
        ({"stop_token_ids": [-1]}, "stop_token_ids: "),
        ({"stop_token_ids": list(range(70_000))}, "stop_token_ids: "),
        ({"bad_words": [""]}, "bad_words: "),
        ({"min_tokens": -1}, "min_tokens: "),
        ({"unknown": 1}, "unknown: "),
    ],
)
def test_what_vllm_would_refuse_is_refused_by_the_field_s_name(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        write_asked(fields)


def resolved(row: dict[str, object], **flags: Any) -> SamplingParams:
    return resolve_sampling(JobSettings.from_flat({"model": "m"} | flags).sampling, {}, row)


def test_a_row_s_wish_goes_before_the_flag_s_and_that_before_an_option_s() -> None:
    def penalty(row: dict[str, object], **flags: Any) -> float:
        return read_asked(resolved(row, **flags).asked).presence_penalty

    assert penalty({}, presence_penalty=1.0) == 1.0
    assert penalty({"presence_penalty": 0.5}, presence_penalty=1.0) == 0.5
    assert penalty({"presence_penalty": 0.0}, presence_penalty=1.0) == 0.0
    assert resolved({"presence_penalty": 0.0}, presence_penalty=1.0).asked == ""
    options = ["min_tokens=3", 'logit_bias={"7": -100}', 'bad_words=["x"]']
    rules = read_asked(resolved({"min_tokens": 4}, generation_options=options).asked)
    assert (rules.min_tokens, rules.logit_bias, rules.bad_words) == (4, {7: -100.0}, ("x",))


def test_log_probabilities_of_a_job_can_be_declined_by_a_row() -> None:
    assert resolved({}, logprobs=5).logprobs == 5
    assert resolved({"logprobs": False}, logprobs=5).logprobs is None
    assert resolved({"logprobs": 0}, logprobs=5).logprobs == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"n": 0}, "n must lie in"),
        ({"n": 10**6, "temperature": 1.0}, "n must lie in"),
        ({"n": 2}, "n is 2, but a temperature of 0"),
        ({"n": True}, "n must be a whole number"),
        ({"logprobs": 21}, "logprobs must lie in"),
        ({"logprobs": -1}, "logprobs must lie in"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens is 9, and max_new_tokens 8"),
        ({"asked": "{}"}, "unknown sampling field 'asked'"),
        ({"bad_words_ids": [[1]]}, "unknown sampling field 'bad_words_ids'"),
    ],
)
def test_what_contradicts_itself_is_refused_by_the_field_s_name(
    row: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sampling(SamplingSettings(), {}, row)
