"""Writes the prompts of the recycling experiment: cache_prompts.csv and test_prompts.csv.

    python data/make_paper_prompts.py

Cache prompts are computed beforehand and kept; test prompts are then asked. Of two sorts: talk,
short questions of the kind that a chat model is asked (written here; the paper's own sentences are
not known to us), and desk, long prompts of the embedded model's tasks, drawn like the demo's, with
the answers that are right. `kind` says what a test prompt is to a cache prompt: `exact` the same
text, `extends` begins with all of it, `diverges` begins like it, `paraphrase` means the same in
other words, `miss` neither. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from corpus import Item, Question, Task, Topic, draw_topic
from layout import COMMON_HEADER, TASK_HEADERS, join, plain_prompt

Row = tuple[str, str, str, str]
"""id, text, kind, answer."""

_NUM_FACTS = 9
_TALK_CACHE = (
    "Explain machine learning in simple terms.",
    "What is the capital of France?",
    "Tell me a short story about a lighthouse.",
    "How do I bake bread at home?",
    "Why is the sky blue?",
    "Give me three tips for learning a language.",
    "What should I pack for a week in the mountains?",
)
_TALK_TESTS = (
    ("Explain machine learning in simple terms. Use an example from daily life.", "extends"),
    ("What is the capital of France? And what is it known for?", "extends"),
    ("Why is the sky blue?", "exact"),
    ("How do I bake bread without an oven?", "diverges"),
    ("In plain words, what does machine learning mean?", "paraphrase"),
    ("Seven green boats left the harbour before dawn.", "miss"),
)


def draw_desk(task: Task, rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Return a cache prompt (header and topic, as far as its items share them) and its tests."""
    topic = draw_topic(task, rng, _NUM_FACTS, "known")
    first, second = TASK_HEADERS[task]
    item, other = topic.draw_item(rng), topic.draw_item(rng)
    cached = join(COMMON_HEADER, first, topic.text)
    tests = [
        _ask(join(COMMON_HEADER, first), topic, item, "extends", rng),
        _ask(join(COMMON_HEADER, first), topic, other, "extends", rng),
        _ask(join(COMMON_HEADER, second), topic, item, "paraphrase", rng),
    ]
    return cached, tests


def _ask(
    header: str, topic: Topic, item: Item, kind: str, rng: random.Random
) -> tuple[str, str, str]:
    question: Question = rng.choice(item.questions)
    return plain_prompt(header, topic, item, question), kind, question.answer


def draw_whole(task: Task, rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Return a whole prompt that is kept, itself as a test, and another item below its topic."""
    topic = draw_topic(task, rng, _NUM_FACTS, "known")
    header = join(COMMON_HEADER, TASK_HEADERS[task][0])
    cached, _, answer = _ask(header, topic, topic.draw_item(rng), "exact", rng)
    diverging = _ask(header, topic, topic.draw_item(rng), "diverges", rng)
    return cached, [(cached, "exact", answer), diverging]


def draw_miss(rng: random.Random) -> tuple[str, str, str]:
    """Return a prompt that shares nothing with any other, from its first word on."""
    topic = draw_topic("answer", rng, _NUM_FACTS, "known")
    return _ask(
        f"Utrecht, May. {TASK_HEADERS['answer'][0]}", topic, topic.draw_item(rng), "miss", rng
    )


def draw_prompts(seed: int) -> tuple[list[Row], list[Row]]:
    """Return the cache prompts and the test prompts."""
    rng = random.Random(f"paper-{seed}")
    cached = [(text, "talk") for text in _TALK_CACHE]
    tests = [(text, kind, "") for text, kind in _TALK_TESTS]
    desk = [draw_desk("classify", rng), draw_desk("answer", rng), draw_whole("extract", rng)]
    for kept, asked in desk:
        cached.append((kept, "desk"))
        tests += asked
    tests.append(draw_miss(rng))
    numbered = [(f"c{i:02d}", text, sort, "") for i, (text, sort) in enumerate(cached)]
    return numbered, [(f"t{i:02d}", *test) for i, test in enumerate(tests)]


def write_rows(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Write as many of each row's values as there are columns."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row[: len(columns)] for row in rows)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    cached, tests = draw_prompts(args.seed)
    write_rows(args.out / "cache_prompts.csv", ("id", "text", "kind"), cached)
    write_rows(args.out / "test_prompts.csv", ("id", "text", "kind", "answer"), tests)


if __name__ == "__main__":
    main()
