"""The job of a night is opened once and passed on; what changes between two steps is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CoppiceError, InputError, ModelError
from pipeline.inputs.prompt_source import PromptSource
from pipeline.job.observer import SilentObserver
from pipeline.model import identity
from pipeline.night.night import run_night
from pipeline.night.settings import Night
from pipeline.night.steps import Step
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.night.job import DAY, NightlyJob
from tests.tiny_job import answers, write_prompts

TEMPLATE = "{% for name, value in fields('title', 'body') %}{{ name }}: {{ value }}\n{% endfor %}"


def input_of(job: NightlyJob) -> Path:
    return job.folder / "in" / DAY.isoformat() / "p.parquet"


def count(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """How often it is called."""
    calls: list[str] = []
    real = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*arguments, **options)

    patch.setattr(owner, name, called)
    return calls


def test_a_night_opens_its_job_once(job: NightlyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four steps opened it, hashed its model, and read all rows for their order."""
    table = {"title": ["a", "b", "a"], "body": ["one", "one", "two"]}
    pq.write_table(pa.table(table), input_of(job))
    (job.folder / "prompt.j2").write_text(TEMPLATE)
    job.say(template="prompt.j2", reorder_fields=True)
    opened = count(monkeypatch, PromptTokenizer, "load")
    identified = count(monkeypatch, identity, "hash_model_folder")
    ordered = count(monkeypatch, PromptSource, "iter_fields")
    (ending,) = job.sit()
    assert ending.state == "completed", ending.sentence()
    assert (len(opened), len(identified), len(ordered)) == (1, 1, 1)


def other_input(job: NightlyJob) -> None:
    write_prompts(input_of(job), ["something else?", "and more?"])


def more_input(job: NightlyJob) -> None:
    table = {"id": ["more"], "prompt": ["something more?"]}
    pq.write_table(pa.table(table), input_of(job).with_name("q.parquet"))


def other_model(job: NightlyJob) -> None:
    config = job.folder / "model" / "generation_config.json"
    config.write_text('{"temperature": 0.7}')


def own_model(job: NightlyJob, model: Path) -> None:
    """A copy that a test may change."""
    (job.folder / "model").mkdir()
    for path in model.iterdir():
        (job.folder / "model" / path.name).write_bytes(path.read_bytes())
    job.say(model="model")


def do_and(job: NightlyJob, before: str, act: Callable[[NightlyJob], None]) -> CoppiceError | None:
    """One night, with that done right before a step; what it ended by."""

    def call(name: str, night: Night, step: Step) -> dict[str, Any]:
        if name == before:
            act(job)
        return step()

    try:
        run_night(job.night(), SilentObserver(), None, call)
    except CoppiceError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("act", "kind", "says"),
    [
        (other_input, InputError, "has changed since the run in"),
        (more_input, InputError, "has changed since the run in"),
        (other_model, ModelError, "is not the model of the run"),
    ],
)
def test_what_changes_between_generation_and_audit_is_refused(
    job: NightlyJob, model_folder: Path, act: Any, kind: type[CoppiceError], says: str
) -> None:
    own_model(job, model_folder)
    error = do_and(job, "audit", act)
    assert isinstance(error, kind) and says in str(error)
    assert job.days_published() == []


@pytest.mark.parametrize("act", [other_input, more_input])
def test_what_changes_between_plan_and_generation_is_answered_as_it_is_then(
    job: NightlyJob, act: Callable[[NightlyJob], None]
) -> None:
    assert do_and(job, "generate", act) is None
    rows = sum(pq.read_metadata(p).num_rows for p in input_of(job).parent.glob("*.parquet"))
    assert len(answers(job.run_directory())) == rows


def test_a_step_that_is_tried_again_sees_what_was_mended(job: NightlyJob) -> None:
    """As Prefect does it: the same step of the same night, in one process."""
    whole = input_of(job).read_bytes()

    def call(name: str, night: Night, step: Step) -> dict[str, Any]:
        if name == "generate":
            os.truncate(input_of(job), 100)
            with pytest.raises(InputError):
                step()
            input_of(job).write_bytes(whole)
        return step()

    assert run_night(job.night(), SilentObserver(), None, call).state == "completed"
