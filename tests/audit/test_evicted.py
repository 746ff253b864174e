"""The audit of conversations that gave up tokens: is what was kept computed right, and how far is
it from full attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.engine.conversation import KeptRun, TurnPlacement
from pipeline.job.committed_turns import eviction_log_of
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, JobSettings
from tests.conversation_job import AS_TURNS, Turn, write_turns
from tests.tiny_job import write_model

EVERY_ROW = AuditSettings(audit_sample="100%", audit_free_running=3, audit_arms=4)
NO_ARMS = EVERY_ROW.model_copy(update={"audit_arms": 0})
pytestmark = pytest.mark.usefixtures("few_faults")
WORDS = ["why?", "and then", "no", "go on.", "yes, but when", "a", "hm", "what is it"]
TURNS: list[Turn] = [
    (f"talk {talk}", turn, f"{talk}: {WORDS[(talk + turn) % 8]}")
    for turn in range(9)
    for talk in range(2)
]
NEW = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharper than at random, so that what is seen elsewhere changes what is said."""
    return write_model(tmp_path_factory.mktemp("model"), sharpness=12.0)


def make_run(folder: Path, model: Path, **flat: Any) -> Path:
    source = write_turns(folder / "in.parquet", TURNS)
    said = {"model": str(model), "max_new_tokens": NEW, "dtype": "float32", "device": "cpu"}
    said |= {"evict": "sink-recent", "budget_tokens": 60}
    run_job(str(source), folder / "out", JobSettings.from_flat(said | AS_TURNS | flat))
    return folder / "out"


@pytest.mark.parametrize(
    "flat",
    [
        {"positions": "gap"},
        {"temperature": 1.0, "positions": "rerotate"},
        pytest.param({"evict": "random", "positions": "rerotate"}, marks=pytest.mark.slow),
        pytest.param({"evict": "attention-top"}, marks=pytest.mark.slow),
        {"evict": "h2o"},
        pytest.param({"evict": "snapkv", "positions": "gap"}, marks=pytest.mark.slow),
        pytest.param({"evict": "gist", "gist_tokens": 20}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_turn_of_an_honest_run_is_what_its_rule_says(
    tmp_path: Path, model: Path, flat: dict[str, Any]
) -> None:
    output = make_run(tmp_path, model, **flat)
    rows = pl.read_parquet(output / "data" / "*.parquet")
    assert rows["evictions"].sum() > 3 and rows["error_type"].is_null().all()
    verdict = audit_run(Location(output), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    summary = describe_audit(Location(output))
    assert summary["classes"]["identical"] == summary["rows_audited"] == len(TURNS)
    assert summary["free_running"]["unexplained"] == 0
    assert all(arm["rows_exact"] == arm["rows"] > 0 for arm in summary["arms"].values())
    faults = summary["faults"]
    assert faults["planted"] == 5 and faults["caught"] == faults["changed_an_answer"] > 0


def test_the_distance_from_full_attention_is_told_of_turns_that_it_can_see_whole(
    tmp_path: Path, model: Path
) -> None:
    """A history of more than 128 tokens it cannot; where nothing was given up there is none."""
    output = make_run(tmp_path, model)
    # all of them: four drawn by chance may be such that nothing they would say differs, or none
    audit_run(Location(output), EVERY_ROW.model_copy(update={"audit_arms": len(TURNS)}))
    summary = describe_audit(Location(output))
    rows = pl.read_parquet(output / "data" / "*.parquet").sort("row_index")
    gave_up = rows["evicted_tokens"] > 0
    seen = rows["prompt_tokens"] + rows["completion_tokens"] - 1 <= 128
    assert (gave_up & ~seen).any() and (~gave_up).any()
    told = summary["attention"]
    assert 0 < told["rows"] == (gave_up & seen).sum()
    assert told["kl_mean"] > 1e-3 and told["same_choice"] < 1
    by_age = summary["attention_by_age"]
    assert sum(each["rows"] for each in by_age) == told["rows"]
    assert all(each["turns_ago"] > 0 for each in by_age)
    frame = pl.read_parquet(output / "audit" / "audit.parquet").sort("row_index")
    known = frame["audit_full_kl"].is_not_null()
    assert known.sum() == told["rows"] and not (known & ~(gave_up & seen)).any()


def test_a_run_that_was_computed_wrong_does_not_pass(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[[TurnPlacement], list[KeptRun]] = TurnPlacement.seen_runs

    def wrong(place: TurnPlacement) -> list[KeptRun]:
        runs = right(place)
        return [run._replace(shift=run.shift + 1) for run in runs[:-1]] + runs[-1:]

    monkeypatch.setattr("pipeline.engine.verify.self_test.eviction_self_test", lambda *_: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(TurnPlacement, "seen_runs", wrong)
        output = make_run(tmp_path, model)
    assert not audit_run(Location(output), NO_ARMS).passed


def test_a_log_that_is_not_that_of_the_run_does_not_pass(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written to have been kept is not what was."""
    output = make_run(tmp_path, model)

    def other(log: Any) -> Any:
        return tuple(
            event._replace(kept=tuple((0, 4, runs[-1] - 12, runs[-1]) for runs in event.kept))
            for event in eviction_log_of(log)
        )

    monkeypatch.setattr("pipeline.audit.histories.eviction_log_of", other)
    assert not audit_run(Location(output), NO_ARMS).passed


@pytest.mark.parametrize("positions", ["gap", "rerotate"])
def test_logprobs_of_turns_that_gave_up_tokens_are_judged_by_what_was_kept(
    tmp_path: Path, model: Path, positions: str
) -> None:
    """Seen red: they were not looked at."""
    output = make_run(tmp_path, model, positions=positions, logprobs=1)
    assert pl.read_parquet(output / "data" / "*.parquet")["evictions"].sum() > 3
    verdict = audit_run(Location(output), NO_ARMS)
    assert verdict.passed, verdict.reasons
    found = describe_audit(Location(output))["logprobs"]
    assert found["rows"] == len(TURNS) and found["max_deviation"] < 1e-4
