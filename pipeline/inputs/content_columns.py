"""Which columns prompts are made of: those that flags name, or those of the usual names.

Knows nothing about types and rows.
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.named_columns import find_column, listed
from pipeline.prompt_settings import ReadSettings


def find_content(
    schema: pa.Schema, settings: ReadSettings, name: str, wants_segments: bool
) -> dict[str, str]:
    """What prompts are made of, by part. A column of documents that nobody asks for is none."""
    said = {
        part: column for part in ("prompt", "messages", "segments", "documents")
        if (column := getattr(settings, f"{part}_column"))
    }  # fmt: skip
    _check_said(said, wants_segments)
    for part, column in said.items():
        find_column(schema, column, (), f"--{part}-column", name)
    found = {part: part for part in ("prompt", "messages", "segments") if part in schema.names}
    if wants_segments and "documents" in schema.names:
        found["documents"] = "documents"
    choice: tuple[str, ...] = tuple(said)[:1]
    if "documents" in said or said.keys() == {"prompt"} and "documents" in found:
        choice = ("prompt", "documents")
    elif not said and wants_segments:
        choice = ("segments",) if "segments" in found else ("prompt", "documents")
    elif not said:
        choice = tuple(found)[:1]
    columns = {part: column for part in choice if (column := said.get(part) or found.get(part))}
    if not choice or len(columns) < len(choice):
        raise _without_content(schema, name, wants_segments)
    return columns


def _check_said(said: dict[str, str], wants_segments: bool) -> None:
    """Raises InputError where the flags exclude each other."""
    alone = [f"--{part}-column" for part in said if part != "documents"]
    if len(alone) > 1:
        raise InputError(f"{alone[0]} and {alone[1]} exclude each other; drop one")
    if "documents" in said and alone and "prompt" not in said:
        raise InputError(f"--documents-column and {alone[0]} exclude each other; drop one")


def _without_content(schema: pa.Schema, name: str, wants_segments: bool) -> InputError:
    if wants_segments:
        return InputError(
            f"{name} has neither a column 'segments' nor 'documents' beside 'prompt' (it has "
            f"{listed(schema)}), which --reuse and --document-order need; name yours with "
            "--segments-column, or with --documents-column and --prompt-column"
        )
    return InputError(
        f"{name} has neither a column 'prompt' nor 'messages' (it has {listed(schema)}); "
        "name yours with --prompt-column or --messages-column"
    )
