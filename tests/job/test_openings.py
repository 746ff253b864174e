"""Which rows get what their answers begin with as the end of their prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, write_prompts

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo_model"
LABEL: dict[str, Any] = {
    "type": "object",
    "properties": {"label": {"enum": ["good", "bad", "so, so"]}, "why": {"type": "string"}},
    "required": ["label", "why"],
}
SAME = ("generated_text", "finish_reason", "completion_token_ids", "prompt_tokens", "parsed")


def settings_of(**flat: Any) -> JobSettings:
    usual = {"dtype": "float32", "max_new_tokens": 24, "json_schema": json.dumps(LABEL)}
    return JobSettings.from_flat({"model": str(DEMO)} | usual | flat)


@pytest.mark.parametrize(
    ("asked", "is_opened"),
    [
        ({"stop": ["\n", "why"]}, True),
        ({"stop": ["o"]}, True),
        ({"stop": ["label"]}, False),  # ends in the middle of it
        ({"stop": ['plum {"']}, None),  # begins in some prompts
        ({"stop": ["label"], "min_tokens": 3}, False),
        ({"stop": ["good", "bad", "so"], "min_tokens": 12}, True),
        ({"stop": ["o"], "include_stop_str_in_output": True}, True),
        ({"logprobs": 1}, False),
    ],
)
def test_rows_with_stop_strings_have_openings_in_which_none_ends(
    tmp_path: Path, asked: dict[str, Any], is_opened: bool | None
) -> None:
    prompts = [f"Say what you think of plum {'' if i % 2 else i}" for i in range(6)]
    source = str(
        write_prompts(
            tmp_path / "p.parquet", prompts, sampling_params=[json.dumps(asked)] * len(prompts)
        )
    )
    planned = plan_job(source, settings_of())
    opened = [bool(planned.opening(row)) for row in range(len(prompts))]
    ends = [not prompt.endswith("plum ") for prompt in prompts]
    assert opened == (ends if is_opened is None else [is_opened] * 6)
    run_job(source, tmp_path / "ours", settings_of())
    run_job(source, tmp_path / "plain", settings_of(engine="naive"))
    ours, plain = answers(tmp_path / "ours"), answers(tmp_path / "plain")
    assert ours["status"].to_list() == ["ok"] * 6
    for name in SAME:
        assert ours[name].to_list() == plain[name].to_list(), name
