"""The timed loop of every arm, for any interpreter: the standard library alone. See `job`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]


def answer_batches(
    path: Path,
    engine: str,
    job: dict[str, Any],
    generate: Callable[[Prompts], Prompts],
    *,
    forget: Callable[[], object] = lambda: None,
    counters: Callable[[], Any] = lambda: None,
) -> None:
    """Append one line a batch to `path`; the engine is ready now. `forget` empties its caches."""
    startup_s = time.time() - job["asked_at"]
    history: Prompts = [[] for _ in job["batches"][0]]
    with path.open("a") as answer:
        for number, prompts in enumerate(job["batches"]):
            if job["is_conversation"]:
                history = append(history, prompts)
                prompts = [ids[-job["most_tokens"] :] for ids in history]  # 0: all of them
            if not number or not job["is_conversation"]:
                forget()
            begin = time.perf_counter()
            token_ids = generate(prompts)
            if job["is_conversation"]:
                history = append(history, token_ids)
            line = {
                "batch": number,
                "engine": engine,
                "seconds": time.perf_counter() - begin,
                "startup_s": startup_s,
                "token_ids": token_ids,
                "counters": counters(),
            }
            print(json.dumps(line), file=answer, flush=True)


def append(history: Prompts, more: Prompts) -> Prompts:
    """Each row and what follows it."""
    return [before + after for before, after in zip(history, more, strict=True)]
