"""The command `coppice retry`: flags in, a call of the library."""

from __future__ import annotations

from typing import Any

import typer

from pipeline.cli.arguments import Json, LogFormat, Progress, RunFolder
from pipeline.cli.layers import split_store
from pipeline.cli.logs import make_observer
from pipeline.cli.options import takes_settings
from pipeline.location import Location

app = typer.Typer()


@app.command("retry")
@takes_settings("engine", "write", "fleet", "monitor", "store", "cost")
def retry(
    directory: RunFolder,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
    *,
    flags: dict[str, Any],
) -> None:
    """Compute the failed rows of a complete run again, into the same directory.

    All other settings are those of the run. Rows that were refused because of their input stay
    refused. What is killed goes on by the same command.
    """
    from pipeline.cli.outcome import show_outcome
    from pipeline.run import retry_job

    others, store = split_store(flags)
    run, observer = Location(directory, store), make_observer(progress, log_format)
    show_outcome(run, json, lambda: retry_job(run, others, observer))
