"""The commands about nights, as `cli` has them: flags in, a call of the library. Holds no logic."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.arguments import Json, LogFormat, Progress, RunFolder
from pipeline.cli.layers import merge_section
from pipeline.cli.logs import make_observer
from pipeline.cli.options import takes_settings
from pipeline.cli.streams import result_is_kept, write_result
from pipeline.location import Location
from pipeline.store_settings import ObjectStoreSettings

app = typer.Typer()
NightFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of a nightly job.")]


@app.command()
@takes_settings("store")
def publish(
    directory: RunFolder,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Folder or URL in a bucket.")],
    date: Annotated[
        str | None, typer.Option("--date", help="Publish as this day (else DIR's own name).")
    ] = None,
    job: Annotated[
        str | None, typer.Option("--job", help="Whose day it is (else the folder above DIR).")
    ] = None,
    json: Json = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Put a run whose audit passed where others read it."""
    from pipeline.cli.outcome import show_done
    from pipeline.night.publication import publish_by_hand

    store = merge_section(ObjectStoreSettings, flags)
    done = publish_by_hand(Location(directory, store), Location(target, store), date, job)
    what = f"{done.rows:,} rows {'' if done.is_new else 'were '}published at {done.location}"
    show_done(done.location, json, asdict(done), what)


@app.command()
def night(
    file: NightFile,
    date: Annotated[
        str | None, typer.Option("--date", help="The night of this day, like 2026-11-22.")
    ] = None,
    cron: Annotated[
        str | None, typer.Option("--cron", help="That of the last start by this expression.")
    ] = None,
    timezone: Annotated[
        str | None, typer.Option("--timezone", help="Else the machine's own.")
    ] = None,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Do the unfinished nights of a job, then tonight's."""
    from pipeline.cli.tables import print_json, print_table
    from pipeline.night.dates import choose_date
    from pipeline.night.ending import worst
    from pipeline.night.night import run_nights

    day = choose_date(date, cron, timezone)
    endings = run_nights(file, day, make_observer(progress, log_format))
    with result_is_kept(file):
        if json:
            print_json({"file": str(file), "nights": [ending.to_json() for ending in endings]})
        else:
            said = [(str(ending.date), ending.sentence()) for ending in endings]
            print_table(str(file), said)
    error = worst(endings)
    if error is not None:
        raise error


@app.command()
def schedule(
    file: NightFile,
    cron: Annotated[str, typer.Option("--cron", help="When, like '0 2 * * *'.")],
    timezone: Annotated[str, typer.Option("--timezone", help="Whose clock: Europe/Berlin.")],
    print_systemd: Annotated[
        bool, typer.Option("--print-systemd", help="Print a service and a timer instead.")
    ] = False,
    print_cron: Annotated[
        bool, typer.Option("--print-cron", help="Print lines of a crontab instead.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the deployment in Prefect.")
    ] = None,
) -> None:
    """Do nights by cron: through Prefect, systemd or cron."""
    from pipeline.night.units import crontab, make_schedule, serve, systemd_units

    planned = make_schedule(file, cron, timezone)
    if print_systemd:
        write_result(systemd_units(planned, datetime.date.today()).rstrip("\n"))
    elif print_cron:
        write_result(crontab(planned).rstrip("\n"))
    else:
        serve(planned, name)
