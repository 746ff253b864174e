"""Where a sampling parameter comes from, and which are refused before any row."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.generation import resolve_sampling
from pipeline.records import SamplingParams
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import JobSettings


@pytest.mark.parametrize(
    ("flags", "repository", "row", "expected"),
    [
        ({}, {}, {}, SamplingParams()),
        (
            {},
            {"do_sample": True, "top_p": 0.9},
            {},
            SamplingParams(temperature=1.0, top_p=0.9, top_k=50),
        ),
        ({}, {"do_sample": False, "temperature": 0.7}, {}, SamplingParams()),
        ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.7}, {}, SamplingParams()),
        ({"max_new_tokens": 9}, {"max_new_tokens": 5}, {}, SamplingParams(max_new_tokens=9)),
        ({"max_new_tokens": 9}, {}, {"max_new_tokens": 3}, SamplingParams(max_new_tokens=3)),
        ({}, {}, {"stop": "x"}, SamplingParams(stop=("x",))),
        ({}, {}, {"stop": ["x", "y"], "top_p": None}, SamplingParams(stop=("x", "y"))),
        ({}, {}, {"top_k": -1}, SamplingParams()),
        ({}, {}, {"seed": 4}, SamplingParams(seed=4)),
    ],
)
def test_the_row_wins_over_flags_over_the_repository(
    flags: dict[str, Any],
    repository: dict[str, Any],
    row: dict[str, object],
    expected: SamplingParams,
) -> None:
    assert resolve_sampling(SamplingSettings(**flags), repository, row) == expected


@pytest.mark.parametrize("row", [{"beams": 2}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_a_row_cannot_ask_for_the_impossible(row: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        resolve_sampling(SamplingSettings(), {}, row)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 101),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -3),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
    ],
)
def test_sampling_that_no_row_could_use_is_refused_before_any_row(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field.replace("_", "-")):
        JobSettings.from_flat({"model": "m", field: value})


def test_one_stop_string_needs_no_list() -> None:
    assert SamplingSettings.model_validate({"stop": "ab"}).stop == ("ab",)
