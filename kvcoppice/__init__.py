"""Answers for a table of prompts, with every shared beginning computed once, and an audit of it.

```python
import kvcoppice

result = kvcoppice.run("prompts.parquet", "out/", model="org/name", max_new_tokens=64)
assert result.audit().passed
answers = result.answers().collect()  # polars; result.report().page is a page to look at
```

Instead of a path it may be a polars frame or a pyarrow table; `kvcoppice.frame` gives the answered
frame at once, and `kvcoppice.relation` a relation of DuckDB. Every setting of `coppice run` is an
argument, with `_` for `-`. The same call again resumes. Nothing heavy is imported before a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcoppice.api import audit, plan, report, retry, run, score
    from kvcoppice.notebooks import frame, relation
    from kvcoppice.results import Audit, Plan, Report, Run
    from pipeline.errors import (
        CoppiceError,
        EngineError,
        InputError,
        Interrupted,
        ModelError,
        StorageError,
        TimeBudgetReached,
        TooManyDegenerate,
        TooManyFailedRows,
        UsageError,
    )

_HOMES = {
    "kvcoppice.api": ("audit", "plan", "report", "retry", "run", "score"),
    "kvcoppice.notebooks": ("frame", "relation"),
    "kvcoppice.results": ("Audit", "Plan", "Report", "Run"),
    "pipeline.errors": (
        "CoppiceError", "EngineError", "InputError", "Interrupted", "ModelError", "StorageError",
        "TimeBudgetReached", "TooManyDegenerate", "TooManyFailedRows", "UsageError",
    ),
}  # fmt: skip

__all__ = [
    "Audit", "CoppiceError", "EngineError", "InputError", "Interrupted", "ModelError", "Plan",
    "Report", "Run", "StorageError", "TimeBudgetReached", "TooManyDegenerate",
    "TooManyFailedRows", "UsageError", "audit", "frame", "plan", "relation", "report", "retry",
    "run", "score",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for. Raises ImportError where a module of another's hides ours."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"kvcoppice has no {name!r}")
    from importlib import import_module

    from kvcoppice.own_modules import check

    check()
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
