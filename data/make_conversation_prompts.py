"""Makes data/conversation_prompts.parquet: conversations of three windows of their model.

    python data/make_conversation_prompts.py

Each turn states facts and asks for one of the first turn, of the two before, or of one between. For
the model of the study of conversations (train_stateful_model.py), whose words these are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stateful.streams import ANSWER, WINDOW, draw_lengths, draw_stream, vocabulary

OUT = Path(__file__).resolve().parent / "conversation_prompts.parquet"
WINDOWS = 3


def draw_table(seed: int, conversations: int) -> list[dict[str, Any]]:
    """Rows with `id`, `conversation_id`, `turn`, `prompt`, `answer`, `kind`, `max_new_tokens`."""
    rng = random.Random(f"conversation-prompts-{seed}")
    table = []
    for number in range(conversations):
        stream = draw_stream(rng, draw_lengths(rng, WINDOWS * WINDOW))
        for place, turn in enumerate(stream):
            table.append({
                "id": f"c{number}-{place}",
                "conversation_id": f"c{number}",
                "turn": place,
                "prompt": write(turn.prompt),
                "answer": write([turn.fact.value]),
                "kind": turn.kind,
                "max_new_tokens": ANSWER,
            })  # fmt: skip
    return table


def write(token_ids: Sequence[int]) -> str:
    """As text, a word a token; a space stands before each, so that turns can be joined."""
    words = vocabulary()
    return "".join(f" {words[token]}" for token in token_ids)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=20)
    args = parser.parse_args()
    table = pa.Table.from_pylist(draw_table(args.seed, args.conversations))
    pq.write_table(table, args.out, compression="zstd")


if __name__ == "__main__":
    main()
