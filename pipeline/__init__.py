"""Bulk text generation from Parquet prompt files that computes shared prompt prefixes once.

`pipeline.run` is the only module that knows the order of its stages; `pipeline.cli.app` wraps it
for people, and the package `flows` for Prefect. Importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.errors import CoppiceError
    from pipeline.records import Completion, SamplingParams
    from pipeline.settings import JobSettings

__all__ = ["Completion", "CoppiceError", "JobSettings", "SamplingParams"]
_HOMES = {
    "Completion": "records",
    "CoppiceError": "errors",
    "JobSettings": "settings",
    "SamplingParams": "records",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: a process for templates needs none of it."""
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"pipeline.{_HOMES[name]}"), name)
