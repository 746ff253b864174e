"""Makes data/segment_prompts.parquet: questions over documents that rows share in any order.

    python data/make_segment_prompts.py

A library of documents; each row shows some of them, in an order of its own, and asks for a key of
one. For the study's model (train_segment_model.py), whose words these are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.segments.tasks import ASK, FILLERS, START, draw_library, vocabulary, write_document

OUT = Path(__file__).resolve().parent / "segment_prompts.parquet"
LIBRARY = 48
SHOWN = 5
FILLER = 12


def draw_table(seed: int, rows: int) -> list[dict[str, Any]]:
    """Rows with `id`, `segments`, `answer` and `max_new_tokens`."""
    rng = random.Random(f"segment-prompts-{seed}")
    library = draw_library(rng, LIBRARY)
    texts = [write(write_document(facts, rng, FILLER)) for facts in library]
    preamble = write([START, *rng.choices(FILLERS, k=3)])
    table = []
    for number in range(rows):
        shown = rng.sample(range(LIBRARY), SHOWN)
        fact = rng.choice(library[rng.choice(shown)])
        segments = [{"role": "system", "text": preamble, "id": None}]
        segments += [{"role": "document", "text": texts[i], "id": f"d{i}"} for i in shown]
        segments.append({"role": "query", "text": write([ASK, fact.left]), "id": None})
        table.append(
            {"id": f"q{number}", "segments": segments, "answer": write([fact.right]),
             "max_new_tokens": 2}
        )  # fmt: skip
    return table


def write(token_ids: Sequence[int]) -> str:
    """As text, a word a token; a space stands before each, so that segments can be joined."""
    words = vocabulary()
    return "".join(f" {words[token]}" for token in token_ids)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    pq.write_table(pa.Table.from_pylist(draw_table(args.seed, args.rows)), args.out)


if __name__ == "__main__":
    main()
