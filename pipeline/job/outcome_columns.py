"""Columns of the output that a completion alone decides, or a reason why there is none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.records import Completion, Timing, TurnState


def state_columns(state: TurnState | None) -> dict[str, Any]:
    """Of the cache at the end of a turn; nothing where the engine says nothing of it."""
    if state is None:
        return {}
    log = [{"at": event.at, "kept": list(map(list, event.kept))} for event in state.eviction_log]
    numbers = {name: getattr(state, name) for name in TurnState.__slots__}
    return numbers | {"eviction_log": log}


def succeeded_columns(completion: Completion, text: str | None) -> dict[str, Any]:
    return {
        "generated_text": text,
        "finish_reason": completion.finish_reason,
        "completion_tokens": len(completion.token_ids),
        "cached_tokens": max(0, completion.cached_tokens),  # less: samples on several devices
        "reuse_source": _source(completion),
        **asdict(completion.timing),
        "status": "ok",
        "attempts": 1,
        "completion_token_ids": completion.token_ids,
    }


def _source(completion: Completion) -> str:
    """Where the KV that this row did not compute came from."""
    if completion.stored_tokens:
        return "store"
    return "run" if completion.cached_tokens > 0 else "none"


def failed_columns(error_type: str, message: str, attempts: int) -> dict[str, Any]:
    return {
        "finish_reason": "error",
        "completion_tokens": 0,
        "cached_tokens": 0,
        "reuse_source": "none",
        **asdict(Timing()),
        "status": "error",
        "error_type": error_type,
        "error_message": message,
        "attempts": attempts,
        "completion_token_ids": [],
    }
