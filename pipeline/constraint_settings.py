"""What a person can choose about the form of answers: files that are read, what excludes what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline import constraints
from pipeline.forms import flag_of

if TYPE_CHECKING:
    from pipeline.settings import JobSettings

CONSTRAINTS: Final = ("json_schema", "regex", "grammar")
"""Settings that say what each answer must be; one of them at most."""


def read_schema(value: object) -> str:
    """A schema as JSON text, of a file, of such a text or of a mapping. Raises ValueError."""
    if isinstance(value, str | Path) and not str(value).lstrip().startswith("{"):
        value = _read_text(Path(value), "of a JSON schema")
    schema = json.loads(constraints.of_schema(value))["json_schema"]
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def read_grammar(value: object) -> str:
    """A grammar, of a file or of its text, which has a rule `start`. Raises ValueError."""
    text = str(value)
    is_text = "start" in text and ":" in text and not _is_file(text)
    if isinstance(value, str | Path) and not is_text:
        text = _read_text(Path(value), "of a grammar")
    constraints.of_grammar(text)
    return text


def _is_file(text: str) -> bool:
    return len(text) < 4096 and Path(text).is_file()


def _read_text(path: Path, what: str) -> str:
    most = 4 * constraints.MOST_CHARACTERS
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)  # of a device there is no size, and no end
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "that is no path"
        raise ValueError(f"cannot read the file {what}, {path} ({reason})") from None
    if len(content) > most:
        raise ValueError(f"{path} is too large to be the file {what}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"cannot read the file {what}, {path} (it is not UTF-8)") from None


def check_constraints(job: JobSettings) -> None:
    """Raises ValueError where an engine would leave out in silence what an answer must be."""
    asked = job.sampling
    said = [flag_of(name) for name in CONSTRAINTS if getattr(asked, name) is not None]
    if job.read.json_schema_column is not None:
        said.append("--json-schema-column")
    if len(said) > 1:
        raise ValueError(f"{said[0]} and {said[1]} exclude each other; leave one of the two out")
    budget = [] if asked.thinking_budget is None else ["--thinking-budget"]
    if job.model.engine == "echo" and said + budget:
        raise ValueError(f"{(said + budget)[0]} says nothing to --engine echo; leave it out")
    if job.model.engine == "vllm" and said + budget:
        flag = (said + budget)[0]
        raise ValueError(
            f"{flag} is for --engine prefix or naive: vLLM ends answers at another token"
        )
