"""Writes the JSON lines beside it: `python -m tests.lm_eval_tasks.make`. All texts are made up.

Real tasks' fields and layouts, small enough for the embedded model: questions with four choices
(mmlu), statements that are true or false (bbh), sentences with four endings (hellaswag).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_TOWNS = ("Aldmoor", "Brackwell", "Corran", "Dunhaven", "Eastmere", "Fellgate", "Gorsley")
_GOODS = ("salt", "wool", "cider", "copper wire", "sea glass", "slate", "honey", "paper")
_PEOPLE = ("Marta", "Ivo", "Lena", "Tomas", "Ruth", "Anders")
_ACTIVITIES = {
    "Baking bread": ("kneads the dough", "waits for it to rise", "heats the oven", "cuts a loaf"),
    "Mending a net": ("ties a knot", "pulls the line tight", "cuts the loose end", "hangs it up"),
    "Painting a door": ("sands the wood", "stirs the paint", "draws the brush down", "steps back"),
}


def question(draw: random.Random) -> dict[str, Any]:
    """As mmlu has it."""
    choices = draw.sample(_GOODS, 4)
    town = draw.choice(_TOWNS)
    text = f"The harbour of {town} is known for one good. Which one does {town} export?"
    return {"question": text, "choices": choices, "answer": draw.randrange(4)}


def statement(draw: random.Random) -> dict[str, Any]:
    """As bbh has it."""
    steps = [draw.randrange(1, 9) for _ in range(draw.randrange(2, 5))]
    walk = " ".join(f"Take {n} step{'s' if n > 1 else ''}. Turn around." for n in steps)
    place = sum(n if i % 2 == 0 else -n for i, n in enumerate(steps))
    text = f"If you follow these instructions, do you return to the starting point? {walk}"
    return {"input": f"{text}\nOptions:\n- Yes\n- No", "target": "No" if place else "Yes"}


def sentence(draw: random.Random) -> dict[str, Any]:
    """As hellaswag has it when its documents are processed."""
    activity = draw.choice(sorted(_ACTIVITIES))
    steps, person = _ACTIVITIES[activity], draw.choice(_PEOPLE)
    at = draw.randrange(len(steps) - 1)
    endings = [
        f"then {steps[at + 1]}.",
        f"then {draw.choice(steps)} and {draw.choice(steps)} without looking up.",
        f"sells {draw.choice(_GOODS)} to {draw.choice(_PEOPLE)}.",
        f"is seen in {draw.choice(_TOWNS)}, where nobody {steps[at]}.",
    ]
    right = endings[0]
    draw.shuffle(endings)
    query = f"{activity}: {person} {steps[at]} in the house at {draw.choice(_TOWNS)}. {person}"
    return {"query": query, "choices": endings, "label": endings.index(right)}


def page(draw: random.Random) -> dict[str, Any]:
    """As wikitext has it."""
    towns = [draw.choice(_TOWNS) for _ in range(draw.randrange(1, 40))]
    return {"page": " ".join(f"{t} exports {draw.choice(_GOODS)} by the sea." for t in towns)}


def write(name: str, documents: Iterable[dict[str, Any]]) -> None:
    lines = "".join(f"{json.dumps(document)}\n" for document in documents)
    (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    draw = random.Random(21)
    for name, make, number in (
        ("mmlu_dev", question, 5), ("mmlu_test", question, 12), ("bbh_test", statement, 12),
        ("hellaswag_train", sentence, 30), ("hellaswag_validation", sentence, 12),
        ("wikitext_test", page, 4),
    ):  # fmt: skip
        write(name, (make(draw) for _ in range(number)))


if __name__ == "__main__":
    main()
