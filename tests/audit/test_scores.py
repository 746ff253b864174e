"""Scores against full prefill: what passes, what does not, and that planted faults are caught."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.audit.gate import current_verdict
from pipeline.audit.score_rows import SCORE_BARS, ScoredInput, audit_scores
from pipeline.engine.base import Likelihood
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings
from pipeline.storage.run_location import reading_run
from tests.test_scores import settings_of, write_rows
from tests.tiny_job import write_model, write_prompts

ROW = ScoredInput(
    row_index=0,
    requests=[([1, 2], [3]), ([1, 2], [4, 5])],
    loglikelihoods=[-1.0, -2.0],
    greedy=[True, False],
    token_counts=[1, 2],
    num_bytes=[1, 2],
    choice_index=0,
)
SAID = [Likelihood(-1.0, 1, 0.0, 0.5), Likelihood(-2.0, 2, 1.0, 0.3)]
BAR = SCORE_BARS["exact"]


def classed(expected: list[Likelihood] = SAID, **changes: Any) -> str:
    return audit_scores(replace(ROW, **changes), expected, BAR).audit.row_class


def test_a_row_that_the_baseline_bears_out_is_identical() -> None:
    assert classed() == "identical"
    assert classed(loglikelihoods=[-1.0005, -2.001]) == "identical"
    never = Likelihood(-math.inf, 1, math.inf, 0.5)
    values = {"loglikelihoods": [-math.inf, -2.0], "choice_index": 1, "greedy": [False, False]}
    assert classed([never, SAID[1]], **values) == "identical"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"loglikelihoods": [-1.002, -2.0]}, "drift"),
        ({"loglikelihoods": [-1.0, -2.002]}, "drift"),
        ({"loglikelihoods": [-1.6, -2.0]}, "corrupt"),
        ({"loglikelihoods": [math.nan, -2.0]}, "corrupt"),
        ({"loglikelihoods": [-1.0, math.nan]}, "corrupt"),
        ({"loglikelihoods": [-math.inf, -2.0], "choice_index": 1}, "corrupt"),
        ({"choice_index": 1}, "corrupt"),
        ({"greedy": [False, False]}, "corrupt"),
        ({"greedy": [True, True]}, "corrupt"),
        ({"token_counts": [1, 1]}, "corrupt"),
        ({"loglikelihoods": [-1.0], "greedy": [True], "token_counts": [1]}, "corrupt"),
        ({"greedy": []}, "corrupt"),
    ],
)
def test_what_differs_is_classed_by_how_much(changes: dict[str, Any], found: str) -> None:
    assert classed(**changes) == found


def test_a_choice_that_the_baseline_cannot_tell_apart_is_a_near_tie() -> None:
    even = [SAID[0], Likelihood(-0.9995, 2, 1.0, 0.3)]
    assert classed(even, loglikelihoods=[-0.9999, -1.0]) == "near_tie"
    barely = [Likelihood(-1.0, 1, 0.0, 1e-4), SAID[1]]
    assert classed(barely, greedy=[False, False]) == "near_tie"


def test_choices_are_compared_as_the_run_did() -> None:
    expected = [SAID[0], Likelihood(-1.9, 2, 1.0, 0.3)]
    values = {"loglikelihoods": [-1.0, -1.9], "choice_index": 1}
    assert classed(expected, normalize="tokens", **values) == "identical"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("audited") / "model", sharpness=3.0)


@pytest.mark.parametrize(
    "flat",
    [
        {"choices_column": "choices"},
        {"choices_column": "choices", "normalize": "bytes", "fidelity": "strict"},
        {"choices_column": "choices", "dtype": "bfloat16"},
        {"choices_column": "choices", "engine": "naive"},
    ],
    ids=["exact", "strict", "16-bit", "naive"],
)
def test_a_run_of_scores_passes_and_planted_faults_are_caught(
    model: Path, tmp_path: Path, flat: dict[str, Any]
) -> None:
    source, run = write_rows(tmp_path / "in.parquet"), Location(tmp_path / "out")
    run_job(str(source), tmp_path / "out", settings_of(model, **flat))
    verdict = audit_run(run, AuditSettings(audit_sample="100%"))
    assert verdict.passed, verdict.reasons
    found = describe_audit(run)
    rows = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")
    assert found["rows_audited"] == rows["dedup_of"].null_count()
    assert found["scores"]["same_choice"] == found["scores"]["rows_with_a_choice"]
    if flat.get("dtype") != "bfloat16":
        assert found["scores"]["delta_max"] < 1e-4
    faults = found["faults"]
    if flat.get("engine") == "naive":
        assert not faults["planted"]
    else:
        least = 1 if flat.get("dtype") == "bfloat16" else 3
        assert faults["planted"] == 4
        assert faults["caught"] == faults["changed_an_answer"] >= least
    assert found["near_tie_bar"] == (1.0 if flat.get("dtype") == "bfloat16" else 1e-3)
    assert found["strict"]["rows"] == found["strict"]["rows_same_bits"]
    assert bool(found["strict"]["rows"]) == (flat.get("fidelity") == "strict")
    with reading_run(run) as directory:
        assert current_verdict(directory, AuditSettings(audit_sample="100%")) == "pass"


def test_choices_of_one_token_are_audited(model: Path, tmp_path: Path) -> None:
    """Seen red: their total probability asked for tokens that an audit did not know."""
    source = write_prompts(tmp_path / "in.parquet", ["is it?", "was it?"])
    run_job(str(source), tmp_path / "out", settings_of(model, choices="y,n"))
    verdict = audit_run(Location(tmp_path / "out"), AuditSettings(audit_sample="100%"))
    assert verdict.passed, verdict.reasons


def test_perplexities_are_audited_over_all_their_windows(model: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", ["hello " * 40, "good day", "a" * 300])
    run_job(str(source), tmp_path / "out", settings_of(model, prompt_logprobs=True))
    run = Location(tmp_path / "out")
    verdict = audit_run(run, AuditSettings(audit_sample="100%"))
    assert verdict.passed and verdict.tokens_checked == 240 + 8 + 300


def test_a_run_that_was_computed_otherwise_fails(model: Path, tmp_path: Path) -> None:
    """Scores of one table in a run that says that they are of another model's weights."""
    from tests.attacks.test_scores import bending

    def bend(completion: Any) -> Any:
        scores = tuple(
            one._replace(logprobs=tuple(value - 0.01 for value in one.logprobs))
            for one in completion.scores
        )
        return replace(completion, scores=scores)

    source = write_rows(tmp_path / "in.parquet")
    asked = settings_of(model, choices_column="choices")
    run_job(str(source), tmp_path / "out", asked, make_engine=bending(bend))
    verdict = audit_run(Location(tmp_path / "out"), AuditSettings(audit_sample="100%"))
    assert not verdict.passed and "identical or near-ties" in verdict.reasons[0]
