"""The pages of the site that are made, not written: a hook of MkDocs (see mkdocs.yml).

Commands are asked of Typer, settings of pydantic, so a page cannot name a flag that is not there.
The Python API is left to mkdocstrings, and the notes of the repository are shown as they are.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that the pages are of, whatever is installed

from pipeline.cli.app import app  # noqa: E402
from pipeline.night.settings import NightSettings  # noqa: E402
from pipeline.settings import JobSettings  # noqa: E402

# page -> the note of the repository that it shows
NOTES = {
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "log.md": "LOG.md",
}
NIGHT_HELP = {
    "name": "Name of the job; run directories lie in OUTPUT/NAME.",
    "input": "Where a night's prompts are; {date} or {date:%Y/%m/%d} in it is the night's date.",
    "output": "Folder, or URL in a bucket, of the run directories.",
    "publish": "Folder, or URL in a bucket, that gets what passed the audit; nowhere if left out.",
    "on_no_input": "Whether a night without input failed or is skipped.",
    "catch_up": "Unfinished nights of so many days before are done first; 0: none.",
}
# What is a number to the code and has a unit for people.
SIZES = ("plan_memory", "kv_budget", "kv_store_budget")
DURATIONS = ("time_budget", "stall_timeout")
SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in JobSettings.model_fields.items()
    if isinstance(field.annotation, type)
}
DEFAULTS = {
    name: field for section in SECTIONS.values() for name, field in section.model_fields.items()
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made to those that are written."""
    pages = {"commands.md": commands_page(), "settings.md": settings_page()}
    pages |= {name: note_page(ROOT / note) for name, note in NOTES.items()}
    pages["python.md"] = python_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


@functools.cache
def commands() -> dict[str, Any]:
    """Every command that does something, by its full name, those of groups as well."""
    return dict(leaves(typer.main.get_command(app), "coppice"))


def commands_page() -> str:
    """Every command with its arguments and flags."""
    text = ["# Commands", "Each line of `coppice --help`, with the defaults of the settings."]
    for name, command in commands().items():
        text += [f"## {name}", described(command.help)]
        text += ["```\n" + usage(name, command) + "\n```", parameters_table(command)]
    return "\n\n".join(text) + "\n"


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(full name, command) of this command, or of all below it if it is a group."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for key, child in inner.items():
        if not child.hidden:
            yield from leaves(child, f"{name} {key}")


def usage(name: str, command: Any) -> str:
    """`coppice run IN [options]`"""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return " ".join([name, *(argument_name(p) for p in arguments), "[options]"])


def argument_name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def parameters_table(command: Any) -> str:
    rows = ["| Argument or flag | Default | |", "| --- | --- | --- |"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_argument = parameter.param_type_name == "argument"
        name = argument_name(parameter) if is_argument else spelled(parameter)
        rows.append(f"| {name} | {parameter_default(parameter)} | {cell(parameter.help)} |")
    return "\n".join(rows)


def spelled(parameter: Any) -> str:
    """The flag as it is typed, and its values where they are listed: `--dtype` auto, float32."""
    flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
    field = DEFAULTS.get(parameter.name)
    annotation = parameter.bare_type if field is None else field.annotation
    listed = get_origin(annotation) is Literal
    return f"{flags} {values(parameter.name, annotation)}" if listed else flags


def parameter_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    field = DEFAULTS.get(parameter.name)
    if field is not None and parameter.default in (None, []):
        return default_of(parameter.name, field)
    return shown(parameter.name, parameter.default)


def settings_page() -> str:
    """Every setting: its name in a YAML file and on the command line, its values, its default."""
    text = [
        "# Settings",
        "A setting is a flag (`--max-new-tokens 64`) or a line of the YAML file that `--config` "
        "names (`max-new-tokens: 64`); flags win over the file, and the file over defaults. "
        "`coppice run ... --print-config` prints all of them. A job every night has those of the "
        "first table beside all others.",
        "## Nights",
        settings_table(NightSettings),
    ]
    for name, section in SECTIONS.items():
        text += [f"## {name.capitalize()}", described(section.__doc__), settings_table(section)]
    return "\n\n".join(text) + "\n"


def settings_table(section: type[BaseModel]) -> str:
    help_of: dict[str, str] = {}
    for command in commands().values():
        for parameter in command.params:
            help_of.setdefault(parameter.name, parameter.help)  # `run` comes before `recycle`
    help_of = NIGHT_HELP if section is NightSettings else help_of
    rows = ["| Setting | Values | Default | |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        flag, written = name.replace("_", "-"), cell(values(name, field.annotation))
        help_text = cell(help_of.get(name))
        rows.append(f"| `{flag}` | {written} | {default_of(name, field)} | {help_text} |")
    return "\n".join(rows)


def values(name: str, annotation: Any) -> str:
    """What may be written: `auto, float32`, `number`, `text`, `size like 8GiB`."""
    if name in SIZES or name in DURATIONS:
        return "size like 8GiB" if name in SIZES else "duration like 4h"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(values(name, a) for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Annotated:
        return values(name, get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    names = {bool: "true, false", int: "whole number", float: "number", str: "text", Path: "path"}
    origin = get_origin(annotation)
    return {tuple: "list", list: "list", dict: "name=value"}.get(origin) or names.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def default_of(name: str, field: FieldInfo) -> str:
    """The default of a setting as a person writes it."""
    return "required" if field.is_required() else shown(name, field.get_default())


def shown(name: str, default: Any) -> str:
    """A default as a person writes it; a dash where there is none."""
    if default is None or default in ((), {}, []):
        return "–"
    if isinstance(default, bool):
        return "`true`" if default else "`false`"
    if name in SIZES:
        return f"`{default / 2**30:g}GiB`"
    if name in DURATIONS:
        return f"`{default / 60:g}m`"
    return f"`{default}`"


def cell(text: str | None) -> str:
    """Text that stays in its cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def described(text: str | None) -> str:
    """A docstring as Markdown, its lines joined."""
    return "\n".join(line.strip() for line in (text or "").splitlines())


def python_page() -> str:
    """What a program imports, from the docstrings."""
    modules = ["kvcoppice.api", "kvcoppice.notebooks", "kvcoppice.results"]
    modules += ["pipeline.settings", "pipeline.prompt_settings", "pipeline.sampling_settings"]
    modules += ["pipeline.store_settings", "pipeline.prompts", "pipeline.records"]
    modules += ["pipeline.errors"]
    text = [
        "# Python",
        "The calls and results of `import kvcoppice`, then the records that they take.",
    ]
    return "\n\n".join([*text, *(f"::: {module}" for module in modules)]) + "\n"


def note_page(path: Path) -> str:
    """A note of the repository, its links to `docs/` made links of the site."""
    text = path.read_text(encoding="utf-8")
    links = {note: page for page, note in NOTES.items()}
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\(([A-Z]+\.md)", lambda found: f"]({links.get(found[1], found[1])}", text)
