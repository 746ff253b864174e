"""What a chat template takes for now: one moment for a whole job, however long it takes."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.reopened_job import reopen_job
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import EngineError, RunDirectoryError, UsageError
from pipeline.job.job import open_job
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.storage.manifest import read_manifest
from pipeline.storage.run_directory import RunDirectory
from tests.tiny_job import FailingEngine, answers, echo_settings, on, write_prompts

EVENING = datetime.datetime(2026, 11, 22, 23, 59)
MORNING = datetime.datetime(2026, 11, 23, 0, 1)
_DATED = "{{ strftime_now('%Y.%m.%d') }} {% for m in messages %}{{ m.content }}{% endfor %}"
# As Llama 3.1 to 3.3 write it.
_LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- macro head() %}{{ 'today: ' + strftime_now('%Y') }} {% endmacro %}"
    "{{ head() + date_string }} {% for m in messages %}{{ m.content }}{% endfor %}"
)
OnDay = Callable[[datetime.datetime], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> OnDay:
    """Set the clock of this process as far as templates see it."""

    def set_clock(moment: datetime.datetime) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return moment  # of the class that a process of its own knows

        for module in ("transformers.utils.chat_template_utils", "pipeline.tokens.chat_template"):
            monkeypatch.setattr(f"{module}.datetime", Clock)

    return set_clock


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "p.parquet", [f"question {number}" for number in range(4)])


def dated(tmp_path: Path, model: Path, template: str = _DATED, **flat: Any) -> JobSettings:
    (tmp_path / "t.jinja").write_text(template)
    own: dict[str, Any] = {
        "chat_template": str(tmp_path / "t.jinja"),
        "apply_chat_template": True,
        "max_new_tokens": 60,
        "rows_per_part": 1,
    }
    return echo_settings(model, **own | flat)


def echoed(output: Path) -> set[str]:
    """Where the answers begin that the echo engine turns round: the date of each prompt."""
    return {text[::-1][:10] for text in answers(output)["generated_text"].to_list()}


def fail_after_two_rows() -> FailingEngine:
    def fail() -> None:
        raise EngineError("the device fell over")

    return FailingEngine(2, fail)


def test_a_run_that_is_resumed_after_midnight_keeps_its_date(
    tmp_path: Path, tokenizer_folder: Path, prompts: Path, at: OnDay
) -> None:
    """Seen red: "was planned differently", at every resume."""
    settings, output = dated(tmp_path, tokenizer_folder), tmp_path / "out"
    at(EVENING)
    with pytest.raises(EngineError):
        run_job(str(prompts), output, settings, make_engine=on(fail_after_two_rows()))
    assert read_manifest(output)["settings"]["tokens"]["clock"] == "2026-11-22T00:00:00"
    at(MORNING)
    echo = on(EchoEngine())
    assert run_job(str(prompts), output, settings, make_engine=echo).counters["rows_ok"] == 4
    assert echoed(output) == {"2026.11.22"}
    assert run_job(str(prompts), output, settings).was_complete


def test_an_audit_takes_the_clock_of_the_run(
    tmp_path: Path, tokenizer_folder: Path, prompts: Path, at: OnDay
) -> None:
    """Seen red: the prompt of another day was replayed."""
    at(EVENING)
    run_job(str(prompts), tmp_path / "out", dated(tmp_path, tokenizer_folder))
    at(MORNING)
    with RunDirectory.open(tmp_path / "out") as directory:
        job = reopen_job(directory)
    assert job.tokenizer.render("why?") == "2026.11.22 why?"
    assert job.describe_generation().endswith("takes 2026-11-22 00:00:00 for now")


def test_a_clock_that_is_given_counts_and_another_is_refused(
    tmp_path: Path, tokenizer_folder: Path, prompts: Path, at: OnDay
) -> None:
    at(MORNING)
    settings = dated(tmp_path, tokenizer_folder, clock="2025-02-01")
    run_job(str(prompts), tmp_path / "out", settings)
    assert echoed(tmp_path / "out") == {"2025.02.01"}
    other = dated(tmp_path, tokenizer_folder, clock="2025-02-02")
    with pytest.raises(RunDirectoryError, match="another clock"):
        run_job(str(prompts), tmp_path / "out", other)


def test_the_clock_is_part_of_the_key_of_the_plan_where_it_is_read(
    tmp_path: Path, tokenizer_folder: Path, prompts: Path, at: OnDay
) -> None:
    """What was tokenised yesterday is not taken for today's; without a date it is."""

    def key(moment: datetime.datetime, template: str) -> str:
        at(moment)
        return open_job(str(prompts), dated(tmp_path, tokenizer_folder, template)).key()

    assert key(EVENING, _DATED) != key(MORNING, _DATED)
    still = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert key(EVENING, still) == key(MORNING, still)


def test_a_job_that_reads_no_clock_records_none(
    tmp_path: Path, tokenizer_folder: Path, prompts: Path
) -> None:
    """Not even one that was given: it decides nothing."""
    settings = echo_settings(tokenizer_folder, clock="2025-02-01")
    run_job(str(prompts), tmp_path / "out", settings)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["settings"]["tokens"]["clock"] is None
    assert "clock" not in manifest["fingerprint"]


def test_llama_prints_the_date_of_the_clock(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Also in a macro; and two jobs of one process, and one template, keep theirs."""
    prompts = write_prompts(tmp_path / "p.parquet", ["why?"])
    jobs = [
        open_job(str(prompts), dated(tmp_path, tokenizer_folder, _LLAMA, clock=f"{year}-07-26"))
        for year in (2024, 2025)
    ]
    said = [job.tokenizer.render("why?") for job in [*jobs, jobs[0]]]
    assert said == [f"today: {year} 26 Jul {year} why?" for year in (2024, 2025, 2024)]


@pytest.mark.parametrize(
    "template",
    ["{{ [1, 2]|random }}", "{{ lipsum() }}", "{{ [1, 2] | map('random') | list }}"],
)
def test_a_template_that_draws_lots_is_refused(
    tmp_path: Path, tokenizer_folder: Path, prompts: Path, template: str
) -> None:
    """Seen red: a resume "was planned differently", as with a date."""
    settings = dated(tmp_path, tokenizer_folder, template)
    with pytest.raises(UsageError, match="draws lots"):
        run_job(str(prompts), tmp_path / "out", settings)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_clock_is_a_time_on_the_wall() -> None:
    clock = JobSettings.from_flat({"model": "m", "clock": "2026-11-22T05:00:00+05:30"}).tokens.clock
    assert clock == datetime.datetime(2026, 11, 22, 5)
