"""Flows as commands, with the exit codes of `coppice`.

`python -m kvcoppice.flows generate|score|audit|nightly|schedule` runs one of them here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import CoppiceError
from pipeline.location import Location
from pipeline.night.dates import parse_date

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Input = Annotated[str, typer.Option("--input", help="Parquet or JSONL file, folder or glob.")]
Model = Annotated[str, typer.Option("--model", help="Model folder or hub id.")]
Output = Annotated[str, typer.Option("--output", help="Run directory, or its URL in a bucket.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of other settings.")]
NightFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of the night.")]
Timezone = Annotated[str, typer.Option("--timezone", help="Of the schedule and the dates.")]
Credentials = Annotated[
    str | None, typer.Option("--credentials", help="Prefect block of S3 credentials.")
]
Date = Annotated[str | None, typer.Option("--date", help="Logical date, like 2026-11-22.")]


@app.command()
def generate(
    input: Input,
    output: Output,
    model: Model,
    config: Config = None,
    credentials: Credentials = None,
) -> None:
    """Do the job as a flow; the same call again resumes it."""
    from flows.generate import generate as flow
    from flows.parameters import JobForm

    form = JobForm.model_validate({"model": model, "config": config and config.absolute()})
    flow(Location(input).absolute, Location(output).absolute, form, credentials)


@app.command()
def score(
    input: Input,
    output: Output,
    model: Model,
    config: Config = None,
    credentials: Credentials = None,
) -> None:
    """Score the choices of every row as a flow; the file may say what else is scored."""
    from flows.generate import generate as flow
    from flows.parameters import JobForm
    from pipeline.cli.layers import choices_unless_said
    from pipeline.settings_file import read_config

    said = choices_unless_said({} if config is None else read_config(config))
    form = JobForm.model_validate({"model": model, "config": config and config.absolute(), **said})
    flow(Location(input).absolute, Location(output).absolute, form, credentials)


@app.command()
def audit(output: Output, config: Config = None, credentials: Credentials = None) -> None:
    """Audit a run as a flow; exit code 4 below the bar."""
    from flows.audit import audit as flow
    from flows.parameters import AuditForm

    form = AuditForm.model_validate({"config": config and config.absolute()})
    flow(Location(output).absolute, form, credentials)


@app.command(name="nightly")
def run_nightly(
    file: NightFile, date: Date = None, timezone: Timezone = "UTC", credentials: Credentials = None
) -> None:
    """Do the unfinished nights of FILE, then that of the date (default: today), as a flow."""
    from flows.nightly import nightly as flow

    day = None if date is None else parse_date(date)
    flow(Location(file).absolute, timezone, day, credentials)


@app.command()
def schedule(
    file: NightFile,
    cron: Annotated[str, typer.Option("--cron", help="When nights start, like '0 2 * * *'.")],
    timezone: Timezone = "UTC",
    name: Annotated[str | None, typer.Option("--name", help="Name of the deployment.")] = None,
) -> None:
    """Serve the nights of FILE to a Prefect server until a signal."""
    from flows.schedule import serve

    serve(file, cron, timezone, name)


def main() -> None:
    """Run the command; errors that are meant for a person become their exit code."""
    try:
        app()
    except CoppiceError as error:
        print(f"coppice: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
