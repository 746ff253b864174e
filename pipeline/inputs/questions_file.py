"""A file of questions: YAML as people write it becomes a `Questionnaire`. Knows no table.

Every scalar is read as the text that it is: `[yes, no]` are two labels, and not true and false.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.forms import say_fault
from pipeline.questions import Question, Questionnaire
from pipeline.settings_file import check_keys, describe_fault

_MOST_BYTES = 1 << 20
_KEYS = ("instructions", "answer", "questions")


def read_questions(path: Path) -> Questionnaire:
    """The questions of a file. Raises UsageError, which names what is wrong and where."""
    content = _parse(path, _read(path))
    if not content:
        raise UsageError(f"{path} holds no questions; write some, like 'questions: [...]'")
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping with a list, like 'questions: [...]'")
    unknown = next((key for key in content if key not in _KEYS), None)
    if unknown is not None:
        raise UsageError(f"{path} has the key {str(unknown)!r}; known are {', '.join(_KEYS)}")
    if "questions" not in content:
        raise UsageError(f"{path} holds no questions; add a list, like 'questions: [...]'")
    try:
        return Questionnaire.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}{_say(error)}") from None


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise UsageError(
                f"{path} has {size:,} bytes, and a file of questions at most {_MOST_BYTES:,}; "
                "text of rows belongs into their columns"
            )
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the questions {path} ({error.strerror})") from None
    except UnicodeError:
        raise UsageError(f"{path} is not YAML: it is not UTF-8; write it anew") from None


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Scalars are texts, and a key is there once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        check_keys(node)
        return super().construct_mapping(node, deep)


def _parse(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise UsageError(f"{path} is nested too deep; write a flat list of questions") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not YAML: {describe_fault(error)}") from None


def _say(error: ValidationError) -> str:
    """Of a fault in the file: which question it is, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    where = first["loc"]
    at = f", question {int(where[1]) + 1}" if len(where) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{at}: {str(where[-1])!r} is not known; it has {', '.join(Question.model_fields)}"
    if first["type"] in ("model_type", "dict_type"):
        return f"{at}: write a mapping of {', '.join(Question.model_fields)}"
    said = say_fault(error, ("text", "instructions")).removeprefix("setting ")
    whole = len(where) == 2 and isinstance(where[-1], int)
    return f"{at}: {said.partition(': ')[2] if whole else said}"
