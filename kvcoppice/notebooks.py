"""Frames and relations in, answered ones out: a job as one step of a notebook.

```
 frame ─► frames/<hash of its rows>/prompts.parquet ─► frames/<...>/runs/<run id>/ ─► answered frame
```

The run id stands for all that decides an answer: rows, model, settings, and not the day on which a
template that prints it was first asked. So the same call again goes on where a killed one ended, or
reads what is there, and whatever is different is a run of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa

from kvcoppice.api import FsPath, Progress, run
from kvcoppice.frames import keep_frame
from kvcoppice.results import Run
from pipeline.cli.logs import make_observer
from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.settings import JobSettings
from pipeline.storage.manifest import run_id_of

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame, pa.Table)


def frame(
    rows: Frame,
    output: FsPath | None = None,
    *,
    model: FsPath,
    progress: Progress = "none",
    **settings: Any,
) -> Frame:
    """The rows with their answers beside them, in their order, and of the same kind of frame.

    `settings` are those of `coppice run`, with `_` for `-`. `output`: a run directory of your own,
    which refuses other rows or settings; None: one in the user's cache, which is kept for thirty
    days after its last use. Raises what `run` does.
    """
    done = _run(rows, output, model, progress, settings)
    answered = _in_order(done.answers(), _names(rows))
    if isinstance(rows, pl.LazyFrame):
        return answered
    table = answered.collect()
    return table if isinstance(rows, pl.DataFrame) else table.to_arrow()


def relation(
    rows: Any,
    output: FsPath | None = None,
    *,
    model: FsPath,
    progress: Progress = "none",
    **settings: Any,
) -> Any:
    """As `frame`, of a DuckDB relation and in its connection: a relation over the run directory.

    Rows that DuckDB gives in another order are other rows to it: end the query with ORDER BY.
    """
    if not all(hasattr(rows, name) for name in ("pl", "query", "columns")):
        raise UsageError(
            f"rows are a relation of DuckDB, like duckdb.sql(...), not {type(rows).__name__}; "
            "kvcoppice.frame takes polars frames and pyarrow tables"
        )
    if output is not None and Location(os.fspath(output)).is_remote:
        raise UsageError(
            f"DuckDB reads the answers on this machine, and {output} is elsewhere; name a folder, "
            "or none"
        )
    done = _run(rows.pl(), output, model, progress, settings)
    names = _in_order(done.answers(), list(rows.columns)).collect_schema().names()
    parts = ", ".join(_quoted(str(path), "'") for path in sorted(Path(done.output).glob(_PARTS)))
    chosen = ", ".join(_quoted(name, '"') for name in names)
    return rows.query(
        "kvcoppice_rows", f"SELECT {chosen} FROM read_parquet([{parts}]) ORDER BY row_index"
    )


_PARTS = "data/*.parquet"


def _run(
    rows: pl.DataFrame | pl.LazyFrame | pa.Table,
    output: FsPath | None,
    model: FsPath,
    progress: Progress,
    settings: dict[str, Any],
) -> Run:
    from pipeline.run import open_to_run, run_opened

    if isinstance(rows, str | os.PathLike):
        raise UsageError("rows are a frame here; kvcoppice.run takes the path of a file")
    if output is not None:
        return run(rows, output, model=model, progress=progress, **settings)
    chosen = JobSettings.from_flat({**settings, "model": os.fspath(model)})
    prompts = keep_frame(rows)
    runs = Path(prompts).parent / "runs"
    job = open_to_run(prompts, Location(runs / "next"), chosen)
    decides = dict(job.fingerprint)
    is_dated = chosen.tokens.clock is None and decides.pop("clock", None) is not None
    own = Location(runs / run_id_of(decides), chosen.store)
    if is_dated:  # what the first call took for now holds for all that follow
        job = open_to_run(prompts, own, chosen)
    outcome = run_opened(job, own, chosen.write.time_budget, make_observer(progress))
    return Run.of(outcome, own)


def _names(rows: pl.DataFrame | pl.LazyFrame | pa.Table) -> list[str]:
    if isinstance(rows, pa.Table):
        return list(rows.column_names)
    return rows.collect_schema().names()


def _in_order(answers: pl.LazyFrame, names: list[str]) -> pl.LazyFrame:
    """Columns of the frame first, as it had them, but where their name is taken."""
    found = answers.collect_schema().names()
    renamed = {*found} - {*names}
    first = [f"input_{name}" if f"input_{name}" in renamed else name for name in names]
    return answers.select([*first, *(name for name in found if name not in first)])


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark
