"""Frames of a Python program as files, which a job reads, resumes from and is audited with.

```
 <user's cache>/coppice/frames/<hash of the content>/prompts.parquet
```

The same rows have the same file, so that the same call resumes. Only the user may read it; it goes
when nobody has used it for thirty days. After that, call `run` with the frame before an audit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.model.machine import cache_folder
from pipeline.storage.durable import replace_file, write_errors
from pipeline.storage.part_file import encode_parquet

_STALE_S = 30 * 24 * 3600  # an audit, or a resume, may come weeks after the run
_DIGITS = 24


def keep_frame(frame: pl.DataFrame | pl.LazyFrame | pa.Table) -> str:
    """The path of a Parquet file of these rows. Raises UsageError for another type, also of one of
    its columns, StorageError.

    What a lazy frame means is computed here, once a call.
    """
    rows = frame.collect() if isinstance(frame, pl.LazyFrame) else frame
    try:
        content = memoryview(encode_parquet(_table(rows).combine_chunks()))
    except pa.ArrowException:
        _blame(rows)
        raise
    return _keep("frames", "prompts.parquet", content)


def keep_questions(questions: Mapping[str, Any]) -> str:
    """The path of a file that says what `questions` does. Raises UsageError, StorageError."""
    try:
        text = json.dumps(dict(questions), ensure_ascii=False, allow_nan=False)
        content = text.encode()
    except (TypeError, ValueError, RecursionError):
        raise UsageError(
            "questions are a path or a mapping of texts and lists, like {'questions': [...]}"
        ) from None
    return _keep("questions", "questions.json", memoryview(content))


def _keep(kind: str, name: str, content: memoryview) -> str:
    """The path of a file with this content."""
    kept = cache_folder() / kind
    _drop_stale(kept)
    folder = kept / hashlib.sha256(content).hexdigest()[:_DIGITS]
    path = folder / name
    with write_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            os.utime(folder)
            return str(path)
    replace_file(path, content)
    return str(path)


def _table(frame: object) -> pa.Table:
    if isinstance(frame, pl.DataFrame):
        if pl.Object in frame.dtypes:  # of which Arrow gets addresses in memory
            _blame(frame)
        return frame.rechunk().to_arrow()
    if isinstance(frame, pa.Table):
        return frame.replace_schema_metadata(None)  # pandas notes there where its index was
    raise UsageError(
        f"prompts are a path, a polars frame or a pyarrow table, not {type(frame).__name__}; "
        "pl.from_pandas makes one of a pandas frame"
    )


def _blame(frame: pl.DataFrame | pa.Table) -> None:
    """Raises UsageError naming the first column that no Parquet file holds, where there is one."""
    for place, (name, kind) in enumerate(zip(*_columns(frame), strict=True)):
        try:
            if kind == pl.Object:
                raise pa.ArrowNotImplementedError
            encode_parquet(_table(frame[:0, [place]] if isinstance(frame, pl.DataFrame)
                                  else frame.select([place]).slice(0, 0)))  # fmt: skip
        except pa.ArrowException:
            raise UsageError(
                f"the column {name!r} of the frame has the type {kind}, which no Parquet file "
                "holds; cast it or leave it out"
            ) from None


def _columns(frame: pl.DataFrame | pa.Table) -> tuple[list[str], list[Any]]:
    """Names and types."""
    if isinstance(frame, pl.DataFrame):
        return frame.columns, frame.dtypes
    return frame.schema.names, frame.schema.types


def _drop_stale(kept: Path) -> None:
    for folder in kept.glob("*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
