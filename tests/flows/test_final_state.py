"""What a sitting comes to, as a state of Prefect."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prefect.client.schemas.objects import StateType

import flows
from flows.nightly import _run_name, final_state
from pipeline.errors import AuditFailed, CoppiceError, FolderInUse, Interrupted, TimeBudgetReached
from pipeline.night.ending import Ending, NightFailure, NightOutcome, worst
from tests.night.job import DAY, before

AUTOMATIONS = Path(flows.__path__[0]) / "automations.yaml"
DONE = NightOutcome("completed", DAY, rows=4, verdict="pass")


def failed(error: CoppiceError) -> NightFailure:
    return NightFailure(before(1), error)


SITTINGS: list[tuple[list[Ending], str, StateType]] = [
    ([DONE], "Completed", StateType.COMPLETED),
    ([NightOutcome("skipped", DAY)], "Skipped", StateType.COMPLETED),
    (
        [DONE, NightOutcome("completed_with_errors", DAY, 1000, 12, 20)],
        "CompletedWithErrors",
        StateType.COMPLETED,
    ),
    ([failed(TimeBudgetReached("spent"))], "StoppedByTimeBudget", StateType.CANCELLED),
    ([DONE, failed(Interrupted("by a signal"))], "Interrupted", StateType.CANCELLED),
    ([failed(FolderInUse("held"))], "EarlierNightStillRunning", StateType.CANCELLED),
    ([failed(AuditFailed("corrupt")), DONE], "Failed", StateType.FAILED),
]


@pytest.mark.parametrize(("endings", "name", "kind"), SITTINGS, ids=lambda value: str(value)[:20])
def test_a_state_has_the_kind_the_name_and_the_sentences(
    endings: list[Ending], name: str, kind: StateType
) -> None:
    state = final_state(endings, worst(endings))
    assert (state.name, state.type) == (name, kind)
    assert all(ending.sentence() in (state.message or "") for ending in endings)


def test_a_file_that_cannot_be_read_fails_with_its_sentence() -> None:
    error = CoppiceError("nightly.yaml: unknown setting 'modle'; did you mean model")
    assert final_state([], error).message == f"{error}."


def test_the_run_of_a_file_that_cannot_be_read_has_the_files_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prefect asks before the flow can say what is wrong with it."""
    parameters = {"file": str(tmp_path / "reviews.yaml"), "date": "2026-11-22"}
    monkeypatch.setattr("flows.nightly.flow_run", SimpleNamespace(parameters=parameters))
    assert _run_name() == "reviews"


def test_no_night_that_ended_is_a_zombie() -> None:
    """Every final state is an event of its own name. Seen red: without Skipped in the list."""
    rules = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    (zombie,) = (rule for rule in rules if rule["trigger"]["posture"] == "Proactive")
    ends = {f"prefect.flow-run.{name}" for _, name, _ in SITTINGS}
    assert ends | {"prefect.flow-run.Crashed", "prefect.flow-run.Cancelled"} <= set(
        zombie["trigger"]["expect"]
    )
