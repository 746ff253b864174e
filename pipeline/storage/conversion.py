"""JSON lines to Parquet and back, streamed. Knows files; what a line means is `openai_batch`'s.

```
 requests.jsonl ─► rows.parquet        OpenAI batch requests, or plain objects of a row each
 rows.parquet   ─► requests.jsonl      OpenAI batch requests
 run directory  ─► responses.jsonl     OpenAI batch responses, in input order
```
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, UsageError
from pipeline.settings import ReadSettings, StoreSettings
from pipeline.storage.durable import publish, temp_path, write_errors
from pipeline.storage.object_store import is_url
from pipeline.storage.openai_batch import (
    ANSWER_COLUMNS,
    BadRequest,
    is_request,
    request_of_row,
    response_of_answer,
    row_of_request,
)
from pipeline.storage.reader import open_source
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_place import Place, holds_run, reading_run

_ROWS_AT_A_TIME = 4096
_REQUEST_SCHEMA = pa.schema(
    {
        "custom_id": pa.large_string(),
        "prompt": pa.large_string(),
        "messages": pa.large_string(),
        "max_new_tokens": pa.int64(),
        "sampling_params": pa.large_string(),
        "model": pa.large_string(),
    }
)


def convert(source: Place, target: Place, store: StoreSettings | None = None) -> int:
    """Convert by the names' endings, see the module's picture; returns the rows written.

    The target appears whole or not at all; `store` is how an `s3://` source is reached. Raises
    InputError naming the line, UsageError, StorageError.
    """
    if is_url(target):
        raise UsageError("convert writes a file of this machine; copy it to the store afterwards")
    path, reads_lines = Path(target), str(source).endswith(".jsonl")
    if reads_lines and path.suffix == ".parquet" and not is_url(source):
        return _write_whole(path, lambda file: _write_rows(Path(source), file))
    if path.suffix != ".jsonl" or reads_lines:
        raise UsageError(
            "convert from a local .jsonl to .parquet, or from a Parquet file or run directory to "
            ".jsonl"
        )
    store = store or StoreSettings()
    read = _responses if holds_run(source, store) else _requests
    return _write_whole(path, lambda file: _write_lines(read(source, store), file))


def _write_whole(target: Path, write: Callable[[BinaryIO], int]) -> int:
    path = target.absolute()
    temp = temp_path(path)
    with write_errors(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temp.open("xb") as file:
                rows = write(file)
                file.flush()
                os.fsync(file.fileno())
            publish(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    return rows


def _write_rows(source: Path, file: BinaryIO) -> int:
    """Rows of a JSON lines file as Parquet."""
    lines = _read_lines(source)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{source} holds no line; check how it was written")
    lines = chain([first], lines)
    if not is_request(first[1]):
        return _write_plain(source, lines, file)
    content = "prompt" if "prompt" in _row(source, *first) else "messages"
    names = [n for n in _REQUEST_SCHEMA.names if n == content or n not in ("prompt", "messages")]
    schema = pa.schema([_REQUEST_SCHEMA.field(name) for name in names])
    count = 0
    with pq.ParquetWriter(file, schema) as writer:
        while batch := list(islice(lines, _ROWS_AT_A_TIME)):
            rows = [_row_of_kind(source, number, line, content) for number, line in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(rows)
    return count


def _row(source: Path, number: int, line: dict[str, Any]) -> dict[str, Any]:
    try:
        return row_of_request(line)
    except BadRequest as error:
        raise InputError(f"line {number} of {source}: {error}") from None


def _row_of_kind(source: Path, number: int, line: dict[str, Any], content: str) -> dict[str, Any]:
    row = _row(source, number, line)
    if content not in row:
        raise InputError(
            f"line {number} of {source} is of another kind than the first; "
            "put chat and text completions into two files"
        )
    return row


def _write_plain(source: Path, lines: Iterable[tuple[int, dict[str, Any]]], file: BinaryIO) -> int:
    """Objects of any columns; all are needed to know their types."""
    rows = [line for _, line in lines]
    names = dict.fromkeys(name for row in rows for name in row)
    name = ""
    try:
        columns = {}
        for name in names:
            columns[name] = pa.array([row.get(name) for row in rows])
        pq.write_table(pa.table(columns), file)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"the field {name!r} of the lines of {source} does not fit into a column "
            f"({type(error).__name__}); give it one type in all lines"
        ) from error
    return len(rows)


def _read_lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object); empty lines are skipped."""
    try:
        with source.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, _object(source, number, text)
    except OSError as error:
        raise InputError(f"cannot read {source} ({error.strerror or error})") from error


def _object(source: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.removeprefix(codecs.BOM_UTF8), parse_constant=_no_number)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        value = None
    if not isinstance(value, dict):
        raise InputError(f"line {number} of {source} is not a JSON object in UTF-8")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _write_lines(lines: Iterable[dict[str, Any]], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _requests(source: Place, store: StoreSettings) -> Iterator[dict[str, Any]]:
    """Rows that a run would take; one that it would reject is refused here by its number."""
    prompts = open_source(source, ReadSettings(), store)
    columns = prompts.columns
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
            row = {
                "custom_id": name,
                "prompt" if columns.messages is None else "messages": content,
                "max_new_tokens": sampling.pop("max_new_tokens", None),
                "sampling_params": sampling,
                "model": model,
            }
            yield request_of_row(row)


def _responses(source: Place, store: StoreSettings) -> Iterator[dict[str, Any]]:
    """Raises RunDirectoryError for a run that is not complete: half an output looks like one."""
    with reading_run(source, store) as directory:
        yield from _responses_of(directory)


def _responses_of(directory: RunDirectory) -> Iterator[dict[str, Any]]:
    if not directory.is_sealed:
        raise directory.incomplete()
    rows = directory.scan()
    names = rows.collect_schema().names()
    is_chat = _is_chat(directory.read_manifest()["settings"]["read"], names)
    needed = [name for name in (*ANSWER_COLUMNS, "model") if name in names]
    answers = rows.select(needed).sort("row_index").collect()
    for row in answers.iter_rows(named=True):
        yield response_of_answer(row, directory.run_id, is_chat)


def _is_chat(read: dict[str, Any], columns: list[str]) -> bool:
    """Whether the run took conversations, by its settings and the rules of `find_columns`."""
    if read["messages_column"]:
        return True
    return not (read.get("template") or read["prompt_column"] or "prompt" in columns)
