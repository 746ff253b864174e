"""The command `coppice`: flags in, a call of the library, a table or JSON out. Holds no logic.

Results go to stdout; progress, headers and errors go to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import AuditFailed, CoppiceError, UsageError, place_of
from pipeline.night_cli import app as night_app
from pipeline.settings import (
    AuditSettings,
    EngineSettings,
    FleetSettings,
    ModelSettings,
    MonitorSettings,
    PlanSettings,
    ReadSettings,
    RecycleSettings,
    SamplingSettings,
    StoreSettings,
    TokenSettings,
    WriteSettings,
)
from pipeline.terminal import recycle
from pipeline.terminal.arguments import Config, Input, Json, LogFormat, Progress, RunFolder
from pipeline.terminal.logs import log_error, log_to_stderr, make_observer
from pipeline.terminal.options import merge, merge_section, split_store, takes_settings, to_flat

app = typer.Typer(
    name="coppice",
    help="Bulk text generation from Parquet that computes shared prompt prefixes once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its panels clip long flags at 80 columns
)
app.add_typer(night_app)
app.add_typer(recycle.app, name="recycle")
_READ = (ModelSettings, ReadSettings, TokenSettings, StoreSettings)
_JOB = (*_READ, SamplingSettings, PlanSettings, EngineSettings, RecycleSettings)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
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
    *,
    flags: dict[str, Any],
) -> None:
    """Show what sharing would save; no weights, no device."""
    _plan(input, flags, config, json, output, html)


@app.command()
@takes_settings(*_JOB, WriteSettings, FleetSettings, MonitorSettings)
def run(
    input: Input,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Run directory, or s3:// URL of one.")
    ],
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show settings.")] = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Do the job; the same command again resumes it."""
    if print_config:
        _print_config(flags, config)
    elif dry_run:
        _plan(input, flags, config)
    else:
        from pipeline.run import run_job
        from pipeline.terminal.tables import counter_table, print_table

        outcome = run_job(input, output, merge(flags, config), make_observer(progress, log_format))
        print_table(output, counter_table(outcome.counters))


@app.command()
@takes_settings(StoreSettings)
def status(
    directory: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Until it ends, every 2 s.")] = False,
    json: Json = False,
    *,
    flags: dict[str, Any],
) -> None:
    """How far a job is; works while it runs."""
    from pipeline.job.status import read_status
    from pipeline.terminal.tables import print_json, print_table, status_table, watch_status

    store = merge_section(StoreSettings, flags)
    if watch and not json:
        watch_status(directory, lambda: read_status(directory, store))
        return
    state = read_status(directory, store)
    if json:
        print_json(state)
    else:
        print_table(directory, status_table(state))


@app.command()
@takes_settings(AuditSettings, StoreSettings)
def audit(
    directory: RunFolder,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Compare a sample with full prefill; exit code 4 if it fails."""
    from pipeline.job.auditing import audit_run, describe_audit
    from pipeline.terminal.tables import audit_table, print_json, print_table

    flags, store = split_store(flags)
    settings = merge_section(AuditSettings, flags)
    verdict = audit_run(directory, settings, make_observer(progress, log_format), store)
    summary = describe_audit(directory, store)
    if json:
        print_json(summary)
    else:
        print_table(directory, audit_table(summary))
    if not verdict.passed:
        raise AuditFailed(f"the audit of {directory} failed: {'; '.join(verdict.reasons)}")


@app.command()
@takes_settings(StoreSettings)
def report(directory: RunFolder, *, flags: dict[str, Any]) -> None:
    """Write report.html and report.md."""
    from pipeline.run import report_run

    typer.echo(report_run(directory, merge_section(StoreSettings, flags)))


@app.command()
@takes_settings(*_READ)
def validate(
    input: Input,
    config: Config = None,
    json: Json = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Check every row; show the first prompt as the model will see it."""
    from pipeline.run import validate_input
    from pipeline.terminal.tables import print_json, print_table, validation_table

    found = validate_input(input, merge(flags, config))
    if json:
        print_json(found)
    else:
        print_table(input, validation_table(found))


@app.command()
@takes_settings(StoreSettings)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="JSONL, Parquet or run directory.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Parquet or JSONL.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    *,
    flags: dict[str, Any],
) -> None:
    """OpenAI batch files or plain JSON lines to Parquet, and back."""
    from pipeline.storage.conversion import convert as convert_file

    rows = convert_file(source, target, merge_section(StoreSettings, flags), overwrite)
    typer.echo(f"{rows:,} rows in {target}")


@app.command()
def demo(
    output: Annotated[str, typer.Option("-o", "--output", help="Run directory.")] = "coppice-demo",
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Plan, run, audit and report on the embedded model and prompts."""
    from pipeline.terminal.demo import run_demo

    run_demo(_local(output), progress, log_format)


def _plan(
    input: str,
    flags: dict[str, Any],
    config: Path | None,
    json: bool = False,
    output: str | None = None,
    html: Path | None = None,
) -> None:
    folder = None if output is None else _local(output)
    from pipeline.run import check_plan_targets, plan_job, write_plan, write_plan_page
    from pipeline.terminal.tables import plan_table, print_json, print_table

    check_plan_targets(folder, html)
    planned = plan_job(input, merge(flags, config))
    for line in filter(None, (planned.job.source.summary, planned.job.describe_generation())):
        typer.echo(line, err=True)
    if folder is not None:
        write_plan(planned, folder)
    if html is not None:
        write_plan_page(planned, Path(input).name, html)
    if json:
        print_json(planned.summary.to_json())
    else:
        print_table(f"Plan of {input}", plan_table(planned.summary.to_json()))


def _local(output: str) -> Path:
    """Raises UsageError for a URL, of which a path would make a folder."""
    if "://" in output:
        raise UsageError(f"{output} is not a folder of this machine; only runs are written there")
    return Path(output)


def _print_config(flags: dict[str, Any], config: Path | None) -> None:
    import yaml

    settings = merge(flags, config)
    typer.echo(yaml.safe_dump(to_flat(settings), sort_keys=False), nl=False)


def main() -> None:
    """Run the command; an error that is meant for a person is one line and an exit code.

    Anything else is a fault of ours: its message may quote a prompt, so only its place is named.
    """
    log_to_stderr()
    try:
        app()
    except CoppiceError as error:
        log_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        remedy = "run coppice --debug ... to see the whole traceback"
        log_error(CoppiceError(f"{place_of(error)}; {remedy}"))
        sys.exit(1)
