"""The command `coppice stateful study`: flags in, a call of the library. Holds no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import LogFormat, Progress
from pipeline.cli.logs import make_observer
from pipeline.cli.streams import write_result

app = typer.Typer(
    help="Conversations that outgrow the window: the study of what is given up, and positions.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def options() -> None:
    """Conversations that outgrow the window: the study of what is given up, and positions."""


@app.command()
def study(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Of data/train_stateful_model.py (else ours).")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", min=2, help="Of four windows each.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few streams; quote nothing.")] = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Measure every evictor under every policy of positions, on streams of turns."""
    from pipeline.cli.demo import demo_folder
    from pipeline.stateful.study import StudySettings, run_study

    folder = model or demo_folder() / "stateful_model"
    settings = StudySettings(folder, output, streams, seed=seed)
    page = run_study(
        settings.quick() if quick else settings, make_observer(progress, log_format).say
    )
    write_result(page.read_text("utf-8").rstrip("\n"))
