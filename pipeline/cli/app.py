"""The command `coppice`: flags in, a call of the library, a table or JSON out. Holds no logic.

Results go to stdout; progress, headers and errors go to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import convert, recycle, retry, segments, settings_file, stateful
from pipeline.cli.arguments import (
    Config,
    DryRun,
    Input,
    Json,
    LogFormat,
    Output,
    PrintConfig,
    Progress,
    RunFolder,
    check_arguments,
    describe_wrong_call,
    show_version,
)
from pipeline.cli.layers import merge, merge_scores, merge_section, split_store
from pipeline.cli.logs import log_error, log_to_stderr, make_observer
from pipeline.cli.night import app as night_app
from pipeline.cli.options import takes_settings
from pipeline.cli.settings_file import show_settings
from pipeline.cli.streams import prepare_streams, result_is_kept, say
from pipeline.costs import CostSettings
from pipeline.errors import CoppiceError, OutputLost, UsageError, place_of
from pipeline.location import Location, is_url
from pipeline.settings import AuditSettings, JobSettings
from pipeline.store_settings import ObjectStoreSettings

if TYPE_CHECKING:
    from pipeline.job.observer import Observer
    from pipeline.job.planning import PlannedJob

app = typer.Typer(
    name="coppice",
    help="Bulk text generation from Parquet that computes shared prompt prefixes once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(convert.app)
app.add_typer(retry.app)
app.add_typer(settings_file.app)
app.add_typer(night_app)
app.add_typer(recycle.app, name="recycle")
app.add_typer(segments.app, name="segments")
app.add_typer(stateful.app, name="stateful")
_JOB = (
    "model", "read", "tokens", "store", "sampling", "plan", "engine", "reuse", "conversations",
    "scoring", "recycle", "cost",
)  # fmt: skip
_SCORED = ("model", "read", "tokens", "store", "plan", "engine", "scoring", "recycle", "cost")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Bulk text generation from Parquet that computes shared prompt prefixes once."""


@app.command()
@takes_settings(*_JOB)
def plan(
    input: Input,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the plan's files here.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the tree.")] = None,
    config: Config = None,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Show what sharing would save; no weights, no device."""
    folder = None if output is None else _local(output)
    from pipeline.plan_files import check_plan_targets, write_plan, write_plan_page

    check_plan_targets(folder, html)
    planned = _plan(input, merge(flags, config), make_observer(progress, log_format))
    if folder is not None:
        write_plan(planned, folder)
    if html is not None:
        write_plan_page(planned, Path(input).name, html)
    _show_plan(input, planned, json)


Merge = Callable[[dict[str, Any], Path | None], JobSettings]


def _add_job(name: str, sections: Sequence[str], merged: Merge, purpose: str) -> None:
    """Make a command that does a job; `merged`: its settings, of flags and a file."""

    @app.command(name, help=purpose)
    @takes_settings(*sections, "write", "fleet", "monitor")
    def do(
        input: Input,
        output: Output,
        config: Config = None,
        dry_run: DryRun = False,
        print_config: PrintConfig = False,
        json: Json = False,
        progress: Progress = "auto",
        log_format: LogFormat = "text",
        *,
        flags: dict[str, Any],
    ) -> None:
        settings, observer = merged(flags, config), make_observer(progress, log_format)
        if print_config:
            show_settings(settings, json)
        elif dry_run:
            _show_plan(input, _plan(input, settings, observer), json)
        else:
            from pipeline.cli.outcome import show_outcome
            from pipeline.run import run_job

            job = partial(run_job, input, output, settings, observer)
            show_outcome(Location(output, settings.store), json, job)


_add_job("run", _JOB, merge, "Do the job; the same command again resumes it.")
_add_job(
    "score",
    _SCORED,
    merge_scores,
    "How likely are given continuations? Nothing is generated; the same command again resumes.",
)


@app.command()
@takes_settings("store")
def status(
    directory: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for it, and until it ends.")] = False,
    json: Json = False,
    *,
    flags: dict[str, Any],
) -> None:
    """How far a job is; works while it runs."""
    from pipeline.cli.tables import print_found, status_table, watch_status
    from pipeline.status import read_status, wait_for_status

    run = Location(directory, merge_section(ObjectStoreSettings, flags))
    if watch and not json:
        watch_status(directory, lambda: wait_for_status(run))
        return
    print_found(directory, read_status(run), json, status_table)


@app.command()
@takes_settings("audit", "store")
def audit(
    directory: RunFolder,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Compare a sample with full prefill; exit code 4 if it fails."""
    from pipeline.audit.auditing import audit_run, describe_audit
    from pipeline.cli.tables import audit_table, print_found

    flags, store = split_store(flags)
    settings = merge_section(AuditSettings, flags)
    run = Location(directory, store)
    verdict = audit_run(run, settings, make_observer(progress, log_format))
    summary = describe_audit(run)
    with result_is_kept(directory):
        print_found(directory, summary, json, audit_table)
    verdict.check(directory)


@app.command()
@takes_settings("store", "cost")
def report(directory: RunFolder, json: Json = False, *, flags: dict[str, Any]) -> None:
    """Write report.html and report.md."""
    from pipeline.cli.outcome import show_done
    from pipeline.run import write_report

    others, store = split_store(flags)
    written = write_report(Location(directory, store), merge_section(CostSettings, others))
    show_done(written["page"], json, written, written["page"])


@app.command()
@takes_settings(*_JOB, "write")
def validate(
    input: Input,
    config: Config = None,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Check every row; show the first prompt as the model will see it. Exit code as of a run."""
    from pipeline.cli.tables import print_found, validation_table
    from pipeline.job.outcome import check_failures
    from pipeline.run import validate_input

    settings = merge(flags, config)
    observer = make_observer(progress, log_format)
    found = validate_input(input, settings, observer)
    observer.close()
    print_found(input, found, json, validation_table)
    check_failures(settings.write, found["rows"], found["reasons"], "see the reasons above")


@app.command()
def demo(
    output: Annotated[str, typer.Option("-o", "--output", help="Run directory.")] = "coppice-demo",
    segments: Annotated[
        bool, typer.Option("--segments", help="Documents at any position, beside prefixes.")
    ] = False,
    conversations: Annotated[
        bool, typer.Option("--conversations", help="Conversations that outgrow their window.")
    ] = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Plan, run, audit and report on the embedded model and prompts."""
    from pipeline.cli.demo import run_conversations_demo, run_demo, run_segments_demo

    if segments and conversations:
        raise UsageError("--segments and --conversations are two demos; leave one of them out")
    run = run_segments_demo if segments else run_conversations_demo if conversations else run_demo
    run(_local(output), progress, log_format)


def _plan(input: str, settings: JobSettings, observer: Observer) -> PlannedJob:
    from pipeline.run import plan_job

    planned = plan_job(input, settings, observer=observer)
    observer.close()
    if planned.job.source.summary:
        say(planned.job.source.summary)
    for line in planned.job.describe():
        say(line)
    return planned


def _show_plan(input: str, planned: PlannedJob, json: bool = False) -> None:
    from pipeline.cli.plan_table import plan_table
    from pipeline.cli.tables import print_found

    print_found(f"Plan of {input}", planned.summary.to_json(), json, plan_table)


def _local(output: str) -> Path:
    """Raises UsageError for a URL, of which a path would make a folder."""
    if is_url(output):
        raise UsageError(f"{output} is not a folder of this machine; only runs are written there")
    return Path(output)


def main() -> None:
    """Run the command; an error that is meant for a person is one line and an exit code.

    Anything else is a fault of ours: its message may quote a prompt, so only its place is named.
    """
    prepare_streams()
    log_to_stderr()
    try:
        check_arguments(sys.argv)
        sys.exit(app(prog_name="coppice", standalone_mode=False) or 0)
    except Exception as error:
        ours = error if isinstance(error, CoppiceError) else describe_wrong_call(error)
        if ours is None:
            if "--debug" in sys.argv:
                raise
            remedy = "run coppice --debug ... to see the whole traceback"
            ours = CoppiceError(f"{place_of(error)}; {remedy}")
        if not (isinstance(ours, OutputLost) and ours.is_unwanted):
            log_error(ours)
        sys.exit(ours.exit_code)
