"""Jobs whose rows are turns of conversations, as tests write, plan and answer them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Turn = tuple[str, int, str | None]
"""Conversation, number, text."""
TURNS: list[Turn] = [
    ("a", 1, "hello"), ("b", 1, "good day"), ("a", 2, "why?"), ("a", 5, "and then?"),
    ("c", 1, "hello"), ("b", 2, "who?"), ("c", 2, "what?"), ("a", 7, "bye"),
]  # fmt: skip


AS_TURNS = {"conversation_column": "conversation_id"}
"""Settings of a job whose rows are turns."""


def write_turns(path: Path, turns: Sequence[Turn] = TURNS) -> Path:
    names, numbers, texts = zip(*turns, strict=True)
    ids = [f"r{row}" for row in range(len(turns))]
    columns = {"id": ids, "conversation_id": names, "turn": numbers, "prompt": texts}
    pq.write_table(pa.table(columns), path)
    return path
