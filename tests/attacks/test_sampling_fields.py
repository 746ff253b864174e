"""Sampling fields of every hostile kind: a row runs or is an error of its own, never the job's."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.generation import ROW_RULES, resolve_sampling
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.cells import read_fields
from pipeline.job.prepare import Limits, Preparation
from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import PromptBatch
from pipeline.records import SamplingParams
from pipeline.request_rules import REQUEST_RULES
from pipeline.run import run_job
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import JobSettings
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tiny_job import answers, echo_settings, write_model, write_prompts, write_tokenizer

FIELDS = [*SamplingParams.__dataclass_fields__, *ROW_RULES, *REQUEST_RULES, "__class__", ""]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, 0.0, -0.5,
    1e-320, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "1", "\ud800", [], [""],
    ["x"], [1], {}, {"x": 1}, [[[]]],
]  # fmt: skip


def test_every_field_with_every_value_runs_or_is_an_error_of_its_row(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(str(write_tokenizer(tmp_path)), None, TokenSettings())
    preparation = Preparation(tokenizer, SamplingSettings(), {}, Limits(128, "error"))
    overrides = [{field: value} for field, value in product(FIELDS, VALUES)]
    num = len(overrides)
    batch = PromptBatch(0, [str(i) for i in range(num)], ["hello"] * num, overrides, [None] * num)
    prepared = preparation.prepare(batch)
    assert len(prepared.params) == num == len(prepared.lengths)
    for row, params in enumerate(prepared.params):
        if row in prepared.rejected:
            assert prepared.rejected[row].message.isprintable(), overrides[row]
            continue
        values = (params.max_new_tokens, params.seed, params.top_k)
        assert all(type(v) is int for v in values if v is not None), overrides[row]
        assert type(params.ignore_eos) is bool, overrides[row]
        assert all(type(text) is str for text in params.stop), overrides[row]
        json.dumps([params.temperature, params.top_p], allow_nan=False)
    assert 50 < len(prepared.rejected) < num - 50


@pytest.mark.parametrize("field", ROW_RULES)
def test_a_rule_of_a_row_is_checked_like_the_model_s(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        resolve_sampling(SamplingSettings(), {}, {field: -1})
    with pytest.raises(ValueError, match=f"^{field}: "):
        resolve_sampling(SamplingSettings(), {field: "x"}, {})


def test_extremes_that_are_allowed_run(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    extremes: list[dict[str, Any]] = [
        {"temperature": 1e-308}, {"temperature": 1e-5}, {"temperature": 100.0},
        {"temperature": 1.0, "top_p": 5e-324}, {"temperature": 1.0, "top_k": 2**31 - 1},
        {"temperature": 1.0, "seed": -(2**63)}, {"max_new_tokens": 2**31 - 1},
    ]  # fmt: skip
    cells = [json.dumps(extreme) for extreme in extremes]
    path = write_prompts(tmp_path / "p.parquet", ["hello"] * len(cells), sampling_params=cells)
    settings = JobSettings.from_flat(
        {"model": str(model), "max_new_tokens": 4, "dtype": "float32", "ignore_eos": True}
    )
    run_job(str(path), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["ok"] * len(extremes)
    greedy = rows["completion_token_ids"].to_list()[0]
    assert len(set(greedy)) > 0 and greedy == rows["completion_token_ids"].to_list()[1]
    assert rows["completion_tokens"].to_list()[-1] == 128 - len("hello")


HUGE: list[dict[str, Any]] = [
    {"logit_bias": {str(token): 1 for token in range(10**6)}},
    {"allowed_token_ids": list(range(10**6))},
    {"stop_token_ids": [10**400]},
    {"bad_words": ["x"] * 10**5},
    {"bad_words": ["x" * 10**7]},
    {"bad_words": ["a\u0301" * 4000, "\U0001f600", " \n\t"]},
    {"bad_words": ["\ud800"]},
    {"logit_bias": {"5": float("inf")}},
    {"logit_bias": {"5": float("nan")}},
    {"logit_bias": {"1e3": 1}},
    {"n": 16384, "temperature": 1.0, "best_of": 16383},
    {"logprobs": True, "top_logprobs": 10**30},
    {"min_tokens": 2**31},
]


@pytest.mark.parametrize("fields", HUGE, ids=lambda fields: next(iter(fields)))
def test_what_a_request_lists_without_end_is_its_row_s_error(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    path = write_prompts(
        tmp_path / "p.parquet", ["hello", "hello"], sampling_params=[json.dumps(fields), None]
    )
    settings = echo_settings(write_tokenizer(tmp_path / "t"), fail_on_error="100%")
    begin = time.monotonic()
    run_job(str(path), tmp_path / "out", settings)
    assert time.monotonic() - begin < 30
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list()[1] == "ok"
    if rows["status"][0] == "error":
        assert rows["error_type"][0] == "BadSamplingParams"
        assert (
            next(iter(fields)) in rows["error_message"][0]
            or "surrogate" in rows["error_message"][0]
        )
    else:
        assert "\U0001f600" in str(fields)  # words that the tokenizer spells somehow


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias: a token id must be a whole number"),
        ({"logit_bias": [(5, 1.0), (5, 2.0)]}, "logit_bias: a token is named twice"),
        ({"logit_bias": [(5.5, 1.0)]}, "logit_bias must be an object of token ids"),
        ({"logit_bias": "[[[["}, "logit_bias must be an object of token ids"),
        ({"logit_bias": "[" * 10**5}, "logit_bias must be an object of token ids"),
        ({"return_tokens_as_token_ids": True}, "asks for return_tokens_as_token_ids"),
    ],
)
def test_what_would_be_dropped_in_silence_is_named(said: dict[str, Any], message: str) -> None:
    """Of a token that stood there twice the last bias counted; 5.5 was the token 5."""
    with pytest.raises(BadCell, match=message):
        read_fields(said)


def test_a_list_that_allows_no_token_is_refused_as_by_vllm() -> None:
    with pytest.raises(ValueError, match="allowed_token_ids: allows no token"):
        resolve_sampling(SamplingSettings(), {}, read_fields({"allowed_token_ids": []}))
