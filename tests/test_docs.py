"""What the pages tell is true of the code: commands, flags, settings, messages, links, figures."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.cli.app import app
from pipeline.errors import install_extra
from pipeline.night.settings import NightSettings
from pipeline.settings import JobSettings

ROOT = Path(__file__).resolve().parents[1]
NOTES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
PAGES = [*NOTES, *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = ("README.md", "report.md", "summary.md")  # by coppice itself, into its output
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of each block of code."""
    yield from _FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each line that calls coppice, its continuations joined and comments cut off."""
    for _, content in blocks(page):
        for line in content.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|\bexec |ssh \$host \"|\$ )\s*(coppice \w.*)", line)
            if found:
                yield shlex.split(found[1].rstrip('"&; '), comments=True)


@functools.cache
def whole_command() -> Any:
    return typer.main.get_command(app)


def find_command(words: list[str]) -> Any:
    """The command of Typer that the words call."""
    command = whole_command()
    for word in words:
        inner = getattr(command, "commands", None)
        if inner is None:
            break
        assert word in inner, f"there is no command {word}"
        command = inner[word]
    return command


def line_id(value: object) -> str:
    return value.name if isinstance(value, Path) else ""


@pytest.mark.parametrize("page", PAGES, ids=line_id)
def test_every_flag_of_a_command_is_one_of_it(page: Path) -> None:
    for words in commands(page):
        command = find_command(words[1:])
        known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        said = {word.partition("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)}
        assert said <= known, f"{page.name}: {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=line_id)
def test_every_key_of_a_settings_file_is_a_setting(page: Path) -> None:
    sections = (field.annotation for field in JobSettings.model_fields.values())
    known = {key for section in sections for key in getattr(section, "model_fields", ())}
    known |= set(NightSettings.model_fields)
    for language, content in blocks(page):
        if language == "yaml":
            assert {key.replace("-", "_") for key in yaml.safe_load(content)} <= known


def messages() -> str:
    """Every text of the product, the pieces of one message joined, values left out."""
    texts = []
    for folder in ("pipeline", "flows"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value for p in node.values if isinstance(p, ast.Constant))
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_every_message_that_is_explained_is_one_that_coppice_says() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained, said = re.findall(r"^### `(.+)`$", page, re.MULTILINE), messages()
    assert len(explained) > 30
    assert [text for text in explained if text not in said] == []


@pytest.mark.parametrize("page", PAGES, ids=line_id)
def test_no_page_installs_from_an_index_that_does_not_have_it(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if "pip install" in line]
    assert not [line for line in lines if "kvcoppice" in line and "git+" not in line]
    assert "-e '.[ray]'" in install_extra("ray")


@pytest.mark.parametrize("note", NOTES, ids=line_id)
def test_every_link_of_a_note_leads_somewhere(note: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", note.read_text(encoding="utf-8"))
    assert [to for to in links if "://" not in to and not (ROOT / to).exists()] == []


def test_the_readme_is_short_and_quotes_the_figures_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    measured = readme[readme.index("## Measured") : readme.index("## More")]
    numbers = set(re.findall(r"[\d.,]+ · \*{0,2}[\d.]+ ×", measured))
    assert len(numbers) > 10 and [n for n in numbers if n not in figures] == []


def test_no_comment_points_to_a_note_that_is_not_here() -> None:
    """Seen red with twelve pointers to design notes of another repository."""
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        for name in re.findall(r"[\w/]*\w+\.md\b(?!\.j2)", path.read_text(encoding="utf-8")):
            assert name in WRITTEN or (ROOT / name).exists(), f"{path.name} points to {name}"


def test_the_page_of_settings_has_every_setting_with_its_default() -> None:
    generate = pytest.importorskip("docs.generate", reason="MkDocs is not installed")
    page = generate.settings_page()
    for section in generate.SECTIONS.values():
        for name, field in section.model_fields.items():
            flag = name.replace("_", "-")
            line = next(line for line in page.splitlines() if line.startswith(f"| `{flag}` |"))
            assert line.split(" | ")[2] == generate.default_of(name, field)
            assert len(line.split(" | ")[3]) > 4, f"{flag} is not described"
    assert "| `plan-memory` | size like 8GiB | `2GiB` |" in page
    assert "| `stall-timeout` | duration like 4h | `30m` |" in page
    assert "| `dtype` | auto, float32, bfloat16 | `auto` |" in page
