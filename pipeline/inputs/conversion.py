"""Text files to Parquet, and rows to JSON lines, streamed. What a line means is `openai_batch`'s.

```
 requests.jsonl ─► rows.parquet        OpenAI batch requests, or plain objects of a row each
 rows.json, .csv ─► rows.parquet       a list of plain objects; cells
 rows.parquet   ─► requests.jsonl      OpenAI batch requests
 run directory  ─► responses.jsonl     OpenAI batch responses, in input order
```
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import InputError, RunDirectoryError, UsageError
from pipeline.inputs.chat_fields import fields_of
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.openai_batch import ANSWER_COLUMNS, request_of_row, response_of_answer
from pipeline.inputs.openai_choices import is_ours
from pipeline.inputs.prompt_source import open_source
from pipeline.inputs.text_files import is_text_file, write_rows
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.prompts import ChatPrompt
from pipeline.storage.durable import write_whole
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import holds_run, reading_run
from pipeline.storage.schema import SCORE_FIELDS, fields_among

_ROWS_AT_A_TIME = 4096
_FURTHER = ("reasoning", "reasoning_tokens", "tool_calls")


def convert(source: Location, target: Location, overwrite: bool = False) -> int:
    """Convert by the names' endings, see the module's picture; returns the rows written.

    The target appears whole or not at all, in place of a file only to `overwrite` it. Raises
    InputError naming the line, UsageError, StorageError.
    """
    if target.is_remote:
        raise UsageError("convert writes a file of this machine; copy it to the store afterwards")
    path, reads_lines = target.local, is_text_file(str(source))
    if path.exists() and (not overwrite or target.canonical == source.canonical):
        remedy = "" if overwrite else ", or add --overwrite"
        raise UsageError(f"{path} is there already; choose another name{remedy}")
    if reads_lines and path.suffix == ".parquet" and not source.is_remote:
        return write_whole(path, lambda file: write_rows(InputFile.local(source.local), file))
    if path.suffix != ".jsonl" or reads_lines:
        raise UsageError(
            "convert from a local .jsonl, .json or .csv to .parquet, or from a Parquet file or run "
            "directory to .jsonl"
        )
    if not holds_run(source):
        return write_whole(path, lambda file: _write_lines(_requests(source), file))
    with reading_run(source) as run:
        return write_whole(path, lambda file: _write_responses(run, file, path.parent))


def _write_lines(lines: Iterable[dict[str, Any]], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(_encode(line))
        count += 1
    return count


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _requests(source: Location) -> Iterator[dict[str, Any]]:
    """Rows that a run would take; one that it would reject is refused here by its number."""
    prompts = open_source(source, ReadSettings())
    columns = prompts.columns
    if columns.has_segments:
        raise InputError(
            f"{source} has prompts in segments, which a batch file cannot say; give it a column "
            "prompt or messages"
        )
    has_model = "model" in prompts.schema.names
    for batch in prompts.iter_prompts():
        for bad in batch.rejected:
            raise InputError(f"row {bad.row_index} of {source}: {bad.message}")
        models: list[Any] = [None] * len(batch.ids)
        if has_model:
            rows = np.arange(batch.row_start, batch.row_start + len(batch.ids))
            models = prompts.take(rows).column("model").to_pylist()
        for name, content, override, model in zip(
            batch.ids, batch.contents, batch.overrides, models, strict=True
        ):
            sampling = dict(override)
            if isinstance(content, ChatPrompt):
                sampling |= fields_of(content.given)
                content = content.content
            row = {
                "custom_id": name,
                "prompt" if columns.messages is None else "messages": content,
                "max_new_tokens": sampling.pop("max_new_tokens", None),
                "sampling_params": sampling,
                "model": model,
            }
            yield request_of_row(row)


def _write_responses(directory: RunDirectory, file: BinaryIO, folder: Path) -> int:
    """Responses in input order. They wait, in the order of the parts, in a nameless file.

    Raises RunDirectoryError for a run that is not complete: half an output looks like one.
    """
    directory.check_complete()
    if directory.is_exploded:
        raise RunDirectoryError(
            f"{directory.name} has a row for each sample, and a response has all of them; run "
            "without --explode"
        )
    schema = directory.schema()
    if all(schema.get_field_index(f.name) >= 0 for f in SCORE_FIELDS):
        raise RunDirectoryError(
            f"{directory.name} has scores, which no response of a batch says; read its parts"
        )
    run_id, is_chat = directory.run_id, _is_chat(directory)
    rows, sizes = array("q"), array("q")
    with TemporaryFile(dir=folder) as waiting:
        for answer in _answers(directory):
            rows.append(answer["row_index"])
            sizes.append(waiting.write(_encode(response_of_answer(answer, run_id, is_chat))))
        waiting.flush()
        order = np.argsort(rows)
        starts = np.cumsum(sizes) - sizes
        for start, size in zip(starts[order], np.array(sizes)[order], strict=True):
            file.write(os.pread(waiting.fileno(), size, start))
    return len(rows)


def _answers(directory: RunDirectory) -> Iterator[dict[str, Any]]:
    """What a response is made of, in the order of the parts."""
    for footer in directory.footers():
        with pq.ParquetFile(footer.path) as part:
            schema = part.schema_arrow
            ours = [f.name for f in fields_among(schema.names) if schema.field(f.name) == f]
            names = [n for n in (*ANSWER_COLUMNS, "model") if n in schema.names]
            names += [n for n in _FURTHER if n in ours]
            names += [field.name for field in schema if is_ours(field)]
            for batch in part.iter_batches(_ROWS_AT_A_TIME, columns=names):
                yield from batch.to_pylist()


def _is_chat(directory: RunDirectory) -> bool:
    """Whether the run took conversations, by its settings and the rules of `find_columns`."""
    read = directory.read_manifest().get("settings", {}).get("read", {})
    if read.get("messages_column"):
        return True
    columns = directory.scan().collect_schema().names()
    if read.get("segments_column") or "reuse_mode" in columns:
        return False
    return not (read.get("template") or read.get("prompt_column") or "prompt" in columns)
