"""What an arm is asked and what it answers, as files: any interpreter can read and write them.

An arm is called with the path of the job and the path of its answer. It appends one JSON line for
each batch of prompts that it has finished, with these fields:

- `batch`: number of the batch in the job
- `engine`: name and version
- `seconds`: from "engine made, weights loaded, prompts in memory" to "all tokens are there"
- `startup_s`: from the start of the process to "engine made", with imports and the warm-up
- `token_ids`: new tokens by row
- `counters`: the engine's own counts, where it has any

Caches are cold for every batch. Every engine alike is allowed one warm-up, `warm_up`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Greedy generation of exactly `new_tokens` tokens for every prompt, one batch after another.

    `model`: folder; `batches`: [batch][row] token ids; `rows_at_once`: for engines that are given
    rows batch by batch; `cache_gib`: KV room for engines that must be told; `kv_budget`: bytes;
    `warm_up`: a prompt of its own, two new tokens; `asked_at`: seconds since the epoch.
    `is_conversation`: a batch is the next turn of all conversations, given without the earlier ones
    and their answers, which an engine takes from itself; caches are cold for the first alone. Of
    what it sends, all but the last `most_tokens` is cut; 0: nothing.

    For an engine that carries conversations: `conversations`, of a batch that holds all turns, one
    turn after another; `eviction`, the fields of one; `spill_memory`, bytes of the host that it may
    use for those that give way, None: as it likes.
    """

    model: str
    dtype: str
    new_tokens: int
    batches: list[list[list[int]]]
    rows_at_once: int = 32
    cache_gib: int = 4
    kv_budget: int | None = None
    warm_up: tuple[int, ...] = (11, 12, 13, 14, 15, 16, 17, 18)
    asked_at: float = 0.0
    is_conversation: bool = False
    conversations: int = 0
    most_tokens: int = 0
    eviction: dict[str, Any] | None = None
    spill_memory: int | None = None

    def write(self, path: Path) -> None:
        """As JSON; the process starts now."""
        path.write_text(json.dumps(asdict(self) | {"asked_at": time.time()}))

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job of `write`."""
        return cls(**json.loads(path.read_text()))


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The finished batches so far; a line that was cut off in the middle does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
