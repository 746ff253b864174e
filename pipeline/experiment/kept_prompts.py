"""Prompts to keep or to ask, from CSV or Parquet: id, prompt, kind, answer. Knows no tokens."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError, NoInput
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings

_LONGEST_CELL = 1 << 24


@dataclass(frozen=True)
class KeptPrompt:
    """One row. `kind` says what the file's author expects of it; `answer` may be empty."""

    id: str
    text: str
    kind: str = ""
    answer: str = ""


def read_kept_prompts(path: Path) -> list[KeptPrompt]:
    """The rows of a CSV file (id, prompt or text; also kind, answer), or of a job's Parquet file.

    Raises InputError: missing, no such columns, empty texts, ids that repeat. NoInput: no rows.
    """
    is_csv = path.suffix.lower() == ".csv"
    prompts = list(_read_csv(path) if is_csv else _read_parquet(path))
    if not prompts:
        raise NoInput(f"{path} holds no prompts; add rows below its header")
    seen: set[str] = set()
    for prompt in prompts:
        if not prompt.text.strip():
            raise InputError(f"{path}: prompt {prompt.id} is empty; give it a text or remove it")
        if prompt.id in seen:
            raise InputError(f"{path}: the id {prompt.id} occurs twice; ids must differ")
        seen.add(prompt.id)
    return prompts


def _read_csv(path: Path) -> Iterator[KeptPrompt]:
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, strict=True)
            names = rows.fieldnames or ()
            text = next((name for name in ("prompt", "text") if name in names), None)
            if "id" not in names or text is None:
                missing = "id" if "id" not in names else "prompt"
                raise InputError(
                    f"{path} has no column {missing!r}; the header must name id and prompt"
                )
            for row in rows:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}: line {rows.line_num} has more or fewer cells than the header; "
                        "put texts with commas between double quotes"
                    )
                yield KeptPrompt(row["id"], row[text], row.get("kind", ""), row.get("answer", ""))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}; write it anew") from None


def _read_parquet(path: Path) -> Iterator[KeptPrompt]:
    for batch in open_source(Location(path), ReadSettings()).iter_prompts():
        for name, content in zip(batch.ids, batch.contents, strict=True):
            if not isinstance(content, str):
                raise InputError(f"{path}: row {name} is no text; only plain prompts can be kept")
            yield KeptPrompt(name, content)
