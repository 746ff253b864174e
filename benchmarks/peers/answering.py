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
    asked_at: float,
    batches: list[Prompts],
    generate: Callable[[Prompts], Prompts],
    *,
    forget: Callable[[], object] = lambda: None,
    counters: Callable[[], Any] = lambda: None,
) -> None:
    """Append one line a batch to `path`; the engine is ready now. `forget` empties its caches."""
    startup_s = time.time() - asked_at
    with path.open("a") as answer:
        for number, prompts in enumerate(batches):
            forget()
            begin = time.perf_counter()
            token_ids = generate(prompts)
            line = {
                "batch": number,
                "engine": engine,
                "seconds": time.perf_counter() - begin,
                "startup_s": startup_s,
                "token_ids": token_ids,
                "counters": counters(),
            }
            print(json.dumps(line), file=answer, flush=True)
