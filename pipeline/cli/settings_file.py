"""Settings as YAML on stdout or in a file: those of a job, and all that there are with comments.

The file is made from the settings' own models, so it names every setting, its default and its
choices, and nothing else; `coppice run --config FILE` reads it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import PydanticUndefinedType

from pipeline.cli.layers import to_flat
from pipeline.cli.options import PANELS, WRITTEN_AS, describe_setting
from pipeline.cli.streams import write_result
from pipeline.forms import write_duration, write_size
from pipeline.settings import SECTIONS, JobSettings
from pipeline.settings_file import write_config

app = typer.Typer()
_WIDTH = 98
_HEAD = """\
# All settings of coppice, each with its default: coppice run IN -o OUT --config FILE
# A flag of the command line wins over this file. null: not said, and then as the comment has it.
"""


@app.command("init")
def init(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="To write; else stdout.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Name this model in it.", metavar="<text>")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Write a commented YAML file of all settings, for --config."""
    text = commented_settings(model)
    if file is None:
        write_result(text.rstrip("\n"))
        return
    write_config(file, text, overwrite)
    write_result(str(file))


def show_settings(settings: JobSettings, as_json: bool) -> None:
    """The settings of a job on stdout."""
    flat = to_flat(settings)
    if as_json:
        from pipeline.cli.tables import print_json

        print_json(flat)
        return
    import yaml

    write_result(yaml.safe_dump(flat, sort_keys=False).rstrip("\n"))


def commented_settings(model: str | None = None) -> str:
    """YAML of every setting with its default, below a comment that says what it means."""
    return _HEAD + "\n".join(_lines(model)) + "\n"


def _lines(model: str | None) -> Iterator[str]:
    import yaml

    for section, kind in SECTIONS.items():
        yield f"\n# ---- {PANELS[section]}"
        for name, field in kind.model_fields.items():
            comment = describe_setting(section, name)
            yield from textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# ")
            value = model if name == "model" else _written(name, field.default)
            yield yaml.safe_dump({name.replace("_", "-"): value}, allow_unicode=True).rstrip("\n")


def _written(name: str, value: Any) -> Any:
    """A default as a person would write it."""
    if value is None or isinstance(value, PydanticUndefinedType):
        return None
    if WRITTEN_AS.get(name) == "size":
        return write_size(value)
    if WRITTEN_AS.get(name) == "duration":
        return write_duration(value)
    return list(value) if isinstance(value, tuple) else value
