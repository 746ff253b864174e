"""Every JSON file of a run directory with a value of another type: one sentence that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.auditing import describe_audit
from pipeline.audit.gate import current_verdict
from pipeline.audit.reopened_job import reopen_job
from pipeline.errors import CoppiceError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.model.rates import recall_rates
from pipeline.night.publication import publish_by_hand
from pipeline.run import write_report
from pipeline.settings import ModelSettings
from pipeline.status import read_status
from pipeline.storage.run_directory import RunDirectory
from tests.night.job import DAY, NightlyJob

VALUES: dict[str, Any] = {
    "null": None, "boolean": True, "number": -1.5, "string": "<b>x", "array": [[]],
    "object": {"": 1},
}  # fmt: skip
FIELDS = {  # what is refused, by file and field; a type that is let through stands behind it
    "run.json": (
        "schema_version", "run_id", "created_at", "status", "fingerprint object", "counters object",
        "sessions", "settings", "settings.read", "settings.sampling", "versions object",
        "device object", "input", "input.argument string", "input.rows", "engine", "engine.notes",
        "counters.rows_in", "counters.wall_s", "sessions.0.peak_kv_bytes",
        "calibration", "calibration.mode string", "calibration.decision", "calibration.reasons",
        "calibration.agreement", "calibration.agreement.mean_kl null", "calibration.cost.seconds",
        "calibration.by_documents", "calibration.by_documents.0.documents",
    ),
    "audit/summary.json": (
        "verdict", "reasons", "rows_audited", "bound_95", "classes", "classes.identical",
        "free_running", "free_running.rows", "near_tie_bar", "seed", "similarity", "strict", "arms",
        "faults", "bar", "bar.audit_sample string",
    ),
    "plan/summary.json": (
        "plan_hash", "rows", "saving", "unique_tokens", "kv_budget_bytes null", "estimate null",
    ),
    "metrics.jsonl": ("at string", "rows_per_s null", "decode_tokens_per_s null"),
}  # fmt: skip
AGREEMENT = {
    "rows": 4, "same": 3, "of_rows": 9, "lower_bound": 0.25, "mean_kl": 0.1, "same_choice": 0.9,
}  # fmt: skip
CALIBRATION = {  
    "mode": "concat", "asked_rows": 4, "decision": "reuse", "reasons": [],
    "agreement": AGREEMENT, "by_documents": [{"documents": 2} | AGREEMENT],
    "cost": {"seconds": 1.5, "prefilled_tokens": 90, "generated_tokens": 20},
}  # fmt: skip
CASES = [(name, field) for name, fields in FIELDS.items() for field in fields]


@pytest.fixture(scope="module")
def sound(done_night: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("json") / DAY.isoformat()
    shutil.copytree(done_night / "nights" / "reviews" / DAY.isoformat(), run)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"calibration": CALIBRATION}))
    return run


def commands(run: Path, model: str) -> dict[str, Callable[[], object]]:
    target = run.parent / "answers.jsonl"
    published = run.parent.parent / f"published-{run.parent.name}"
    return {
        "status": lambda: read_status(Location(run)),
        "audit --show": lambda: describe_audit(Location(run)),
        "audit": lambda: reopen_job(RunDirectory.open(run)),
        "gate": lambda: current_verdict(RunDirectory.open(run)),
        "convert": lambda: convert(Location(run), Location(target)),
        "report": lambda: write_report(Location(run)),
        "publish": lambda: publish_by_hand(
            Location(run),
            Location(published),
            None,
            None,
        ),
    }


def replaced(document: Any, field: str, value: Any) -> Any:
    *above, last = [int(step) if step.isdigit() else step for step in field.split(".")]
    place = document
    for step in above:
        place = place[step]
    place[last] = value
    return document


def read_document(path: Path) -> Any:
    return json.loads(
        path.read_text().splitlines()[-1] if "metrics" in path.name else path.read_text()
    )


def kinds(number: int, slow: bool) -> list[str]:
    """Of the field of that number: two in turn and what is let through, or all others."""
    let_through = CASES[number][1].partition(" ")[2]
    names = list(VALUES)
    fast = {names[number % len(names)], names[(number + 2) % len(names)], let_through}
    return [name for name in names if (name not in fast) == slow]


@pytest.mark.parametrize(
    ("slow", "number"),
    [
        pytest.param(slow, number, marks=[pytest.mark.slow] * slow, id=f"{name} {case} {slow}")
        for slow in (False, True)
        for number, (name, case) in enumerate(CASES)
    ],
)
def test_a_value_of_another_type_is_one_sentence(
    sound: Path, tmp_path: Path, slow: bool, number: int
) -> None:
    """Seen red: 43 of 198 ended in "unexpected ..."."""
    name, case = CASES[number]
    field, _, let_through = case.partition(" ")
    run = tmp_path / DAY.isoformat()
    shutil.copytree(sound, run)
    path = run / name
    for kind in kinds(number, slow):
        value = VALUES[kind]
        path.write_text(json.dumps(replaced(read_document(sound / name), field, value)) + "\n")
        refusals = []
        for command, act in commands(run, "").items():
            try:
                act()
            except CoppiceError as error:
                assert "\n" not in str(error) and len(str(error)) < 400, (command, kind, str(error))
                refusals.append(str(error))
        expected = kind not in let_through
        named = [said for said in refusals if name in said or "run.json" in said]
        assert bool(named) == expected, (kind, refusals)


@pytest.mark.parametrize("name", [*FIELDS, "published.json"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\x00", '"x"', "[" * 100_000, "9" * 5000, '{"a": NaN}', "\ud800"],
)
def test_a_file_that_is_no_object_is_one_sentence(
    sound: Path, tmp_path: Path, name: str, content: str
) -> None:
    run = tmp_path / DAY.isoformat()
    shutil.copytree(sound, run)
    published = tmp_path.parent / f"published-{tmp_path.name}" / run.name / name
    path = published if name == "published.json" else run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(errors="surrogatepass") + b"\n")
    refusals = []
    for act in commands(run, "").values():
        try:
            act()
        except CoppiceError as error:
            assert "\n" not in str(error)
            refusals.append(str(error))
    assert any(Path(name).name in said for said in refusals)


@pytest.mark.parametrize("value", VALUES.values())
def test_wrong_rates_in_the_cache_are_no_rates(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """Seen red: text as a rate was kept, and dividing by it ended in a traceback."""
    place = tmp_path / "rates.json"
    monkeypatch.setattr("pipeline.model.rates._path", lambda *_: place)
    said = {"prefill_tokens_per_s": value, "decode_tokens_per_s": 1.0, "measured_on": "today"}
    place.write_text(json.dumps(said))
    assert recall_rates(ModelSettings(model=str(model_folder)), {}) is None


def test_wrong_costs_in_the_cache_are_measured_again(tmp_path: Path) -> None:
    from pipeline.engine.sharing_cost import _SCHEMA

    for value in VALUES.values():
        with pytest.raises(ValueError):
            _SCHEMA.validate_json(json.dumps(value), strict=True)


def test_the_summary_of_a_run_names_what_is_wrong(sound: Path, audited: NightlyJob) -> None:  # noqa: F811
    run = audited.run_directory()
    path = run / "run.json"
    path.write_text(json.dumps(replaced(read_document(path), "counters.rows_in", "many")))
    with pytest.raises(
        CoppiceError, match=r"run\.json is damaged \(counters\.rows_in: .*\); bring"
    ):
        read_status(Location(run))
