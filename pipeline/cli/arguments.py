"""Arguments and options that several commands have. Knows nothing about what they do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.logs import log_to_stderr
from pipeline.cli.streams import write_result
from pipeline.errors import UsageError

Input = Annotated[
    str, typer.Argument(metavar="IN", help="Parquet, JSON or CSV file, folder, glob or URL.")
]
RunFolder = Annotated[
    str, typer.Argument(metavar="DIR", help="Run directory, or its URL in a bucket.")
]
Output = Annotated[
    str, typer.Option("-o", "--output", help="Run directory, or its URL in a bucket.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only plan.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show settings.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of these settings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Progress = Annotated[
    Literal["auto", "plain", "none"], typer.Option("--progress", help="How progress is shown.")
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", help="json: one object a line.", callback=log_to_stderr),
]


def check_arguments(arguments: list[str]) -> None:
    """Raises UsageError for one whose bytes are not UTF-8: no file of ours could name it.

    Nor could it where Python takes names for text of another encoding.
    """
    encoding = sys.getfilesystemencoding()
    for text in arguments:
        if encoding != "utf-8" and not text.isascii():
            raise UsageError(
                f"{text} is read as {encoding} here, and files are named in UTF-8; set "
                "PYTHONUTF8=1 or a locale like C.UTF-8"
            )
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"{text} is not a name in UTF-8; rename it")


def show_version(is_asked: bool) -> None:
    """The version on stdout, and the end, where it is asked for."""
    if is_asked:
        from importlib.metadata import version

        write_result(f"coppice {version('kvcoppice')}")
        raise typer.Exit


def describe_wrong_call(error: Exception) -> UsageError | None:
    """What Typer found wrong with flags and arguments, as an error of ours; None for other errors.

    Typer keeps its errors to itself; what they have in common is that they can be shown.
    """
    describe = getattr(error, "format_message", None)
    if describe is None:
        return None
    context = getattr(error, "ctx", None)
    said = str(describe()).strip() or "no command was given"
    command = "coppice" if context is None else context.command_path
    return UsageError(f"{said.rstrip('.')}; {command} --help lists what there is")
