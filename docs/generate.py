"""The pages of the site that are made, not written: a hook of MkDocs (see mkdocs.yml).

Commands are asked of Typer, settings of pydantic, so a page cannot name a flag that is not there.
The Python API is left to mkdocstrings, and the notes of the repository are shown as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that the pages are of, whatever is installed

from pipeline.cli import app  # noqa: E402
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
    "output": "Folder or s3:// URL of the run directories.",
    "publish": "Folder or s3:// URL that gets what passed the audit; nowhere if left out.",
    "on_no_input": "Whether a night without input failed or is skipped.",
    "catch_up": "Unfinished nights of so many days before are done first; 0: none.",
}
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


def commands_page() -> str:
    """Every command with its arguments and flags."""
    text = ["# Commands", "Each line of `coppice --help`, with the defaults of the settings."]
    for name, command in leaves(typer.main.get_command(app), "coppice"):
        text += [f"## {name}", described(command.help)]
        text += ["```\n" + usage(name, command) + "\n```", parameters_table(command)]
    return "\n\n".join(text) + "\n"


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(full name, command) of every command that does something, below groups as well."""
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
    return f"{flags} {values(annotation)}" if listed else flags


def parameter_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    field = DEFAULTS.get(parameter.name)
    if field is not None and parameter.default in (None, []):
        return "required" if field.is_required() else shown(field.get_default())
    return shown(parameter.default)


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
    help_of = {
        parameter.name: parameter.help
        for _, command in leaves(typer.main.get_command(app), "coppice")
        for parameter in command.params
    }
    help_of = NIGHT_HELP if section is NightSettings else help_of
    rows = ["| Setting | Values | Default | |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else shown(field.get_default())
        help_text = cell(help_of.get(name))
        flag = name.replace("_", "-")
        rows.append(f"| `{flag}` | {cell(values(field.annotation))} | {default} | {help_text} |")
    return "\n".join(rows)


def values(annotation: Any) -> str:
    """What may be written for a type: `auto, float32`, `number`, `text`."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(values(a) for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    names = {bool: "true, false", int: "whole number", float: "number", str: "text", Path: "path"}
    origin = get_origin(annotation)
    return {tuple: "list", list: "list", dict: "name=value"}.get(origin) or names.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def shown(default: Any) -> str:
    """A default as a person writes it; nothing where there is none."""
    if default is None or default in ((), {}, []):
        return "–"
    if isinstance(default, bool):
        return "`true`" if default else "`false`"
    if isinstance(default, int) and default >= 2**30 and default % 2**30 == 0:
        return f"`{default // 2**30}GiB`"
    return f"`{default}`"


def cell(text: str | None) -> str:
    """Text that stays in its cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def described(text: str | None) -> str:
    """A docstring as Markdown, its lines joined."""
    return "\n".join(line.strip() for line in (text or "").splitlines())


def python_page() -> str:
    """What a program imports, from the docstrings."""
    has_front_door = (ROOT / "kvcoppice" / "__init__.py").exists()
    modules = ["kvcoppice.api", "kvcoppice.results"] if has_front_door else ["pipeline.run"]
    modules += ["pipeline.settings", "pipeline.records", "pipeline.errors"]
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
