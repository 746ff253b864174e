"""Arguments and options that several commands have. Knows nothing about what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.terminal.logs import log_to_stderr

Input = Annotated[
    str, typer.Argument(metavar="IN", help="Parquet or JSONL file, folder, glob or s3:// URL.")
]
RunFolder = Annotated[str, typer.Argument(metavar="DIR", help="Run directory or s3:// URL.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of these settings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Progress = Annotated[
    Literal["auto", "plain", "none"], typer.Option("--progress", help="How progress is shown.")
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", help="json: one object a line.", callback=log_to_stderr),
]
