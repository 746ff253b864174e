"""Classification files as people have them: a guide and worked examples that all rows begin with,
then a short text of the row's own. The texts are the questions of the workload files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

Labels = Mapping[str, Mapping[str, str]]
_QUESTION, _ANSWER = "Question: ", "\nAnswer:"

QUESTIONS: Labels = {
    "subject": {
        "history": "events, rulers, wars and societies of the past, and how they came to an end",
        "geography": "countries, cities, rivers, regions, borders, climate, the people of a place",
        "biology": "living things, their bodies, cells, diseases, medicines and how they evolved",
        "physics": "matter, forces, energy, light, heat and how bodies move, in words or formulas",
        "chemistry": "substances, elements, compounds, reactions and the use of them in industry",
        "mathematics": "numbers, proofs, sets, complexity and the theory of algorithms",
        "technology": "machines, engines, networks, computers, broadcasting and building",
        "economy": "money, trade, work, wages, prices, wealth, taxes and companies",
        "law": "courts, constitutions, treaties, rights, parliaments and how laws are made",
        "religion": "churches, faiths, doctrines, worship and those who preach",
        "sports": "games, teams, players, seasons, stadiums and scores",
        "arts": "music, film, television, books, painting, museums and architecture",
    },
    "asks_for": {
        "person": "the name of somebody, or of a group of people",
        "place": "where something is, was or happened",
        "time": "a date, a year, a period or how long something took",
        "quantity": "a count, a share, a distance, an amount of money or another figure",
        "reason": "why something is so, or what it led to",
        "definition": "what a word means, or what a thing is called",
    },
}
PROBLEMS: Labels = {
    "topic": {
        "shopping": "what things cost, change that is given, discounts and budgets",
        "wages": "what somebody earns by the hour, week or piece, with or without overtime",
        "travel": "distances, speeds, fuel and how long a way takes",
        "cooking": "recipes, portions, meals and how food is divided",
        "ages": "how old people are, were or will be",
        "farming": "animals, eggs, crops, gardens and what they give or need",
        "school": "pupils, classes, homework, tests and marks",
        "saving": "money put aside, interest, profit of a sale and loans",
        "measuring": "lengths, areas, volumes and weights of things",
        "counting": "how many things there are in all, or are left, where nothing above fits",
    },
    "operation": {
        "addition": "amounts are put together or taken away, and nothing else",
        "multiplication": "equal parts are taken several times",
        "division": "something is shared out, or a rate is found",
        "percentage": "a share of a whole is taken or found",
        "several": "two or more of these in a row",
    },
}


@dataclass(frozen=True)
class ClassificationFile:
    """`source`: the workload file with the texts. `examples`: a text and its labels each."""

    name: str
    source: str
    labels: Labels
    examples: Mapping[str, tuple[str, ...]]

    @property
    def schema(self) -> dict[str, object]:
        """Of an answer: each property is one of its labels."""
        return {
            "type": "object", "additionalProperties": False, "required": list(self.labels),
            "properties": {name: {"enum": list(meant)} for name, meant in self.labels.items()},
        }  # fmt: skip

    @property
    def guide(self) -> str:
        """What all prompts begin with."""
        parts = ["Classify the question. Answer with one JSON object and nothing else."]
        for name, meant in self.labels.items():
            parts.append(f'\nThe property "{name}" is one of:')
            parts += [f"- {label}: {meaning}" for label, meaning in meant.items()]
        for text, said in self.examples.items():
            answer = json.dumps(dict(zip(self.labels, said, strict=True)), separators=(",", ":"))
            parts.append(f"\n{_QUESTION}{text}{_ANSWER}\n{answer}")
        return "\n".join(parts)

    def frame(self, rows: int, workloads: Path) -> pl.DataFrame:
        """`id`, `prompt`, `form`: the schema as JSON text. Raises ValueError where the workload has
        fewer questions."""
        texts = list(_questions(workloads / f"{self.source}.parquet"))[:rows]
        if len(texts) < rows:
            raise ValueError(f"{self.source} has {len(texts)} questions, asked for {rows}")
        return pl.DataFrame({
            "id": [f"r{i}" for i in range(rows)],
            "prompt": [f"{self.guide}\n\n{_QUESTION}{text}{_ANSWER}\n" for text in texts],
            "form": [json.dumps(self.schema)] * rows,
        })  # fmt: skip


def _questions(path: Path) -> Iterator[str]:
    """The last question of each prompt, in random order, each once."""
    prompts = pl.read_parquet(path, columns=["prompt"])["prompt"].shuffle(seed=0)
    found = (prompt.rsplit(_QUESTION, 1)[1].removesuffix(_ANSWER) for prompt in prompts)
    return iter(dict.fromkeys(found))


FILES = (
    ClassificationFile("questions", "squad_passages", QUESTIONS, {
        "Who led the Roman army at the battle of Zama?": ("history", "person"),
        "In which ocean do the Azores lie?": ("geography", "place"),
        "How many chambers does the heart of a frog have?": ("biology", "quantity"),
        "Why does ice float on water?": ("physics", "reason"),
        "When did the first steam locomotive carry passengers?": ("technology", "time"),
        "What is a sum called that is lent against a house?": ("economy", "definition"),
        "Which court hears appeals from the county courts?": ("law", "definition"),
        "Who wrote the music of The Magic Flute?": ("arts", "person"),
    }),
    ClassificationFile("problems", "gsm8k_8shot", PROBLEMS, {
        "Ann buys 3 pens at $2 each and pays with a $10 note. How much change does she get?":
            ("shopping", "several"),
        "A train goes 240 miles in 4 hours. How many miles does it go in an hour?":
            ("travel", "division"),
        "Tom is 4 years older than his sister, who is 9. How old is Tom?": ("ages", "addition"),
        "A farmer has 12 hens and each lays 5 eggs a week. How many eggs are that in a week?":
            ("farming", "multiplication"),
        "In a class of 30 pupils 40% wear glasses. How many pupils wear glasses?":
            ("school", "percentage"),
        "Lea puts $25 aside each month. How many months does she need for $300?":
            ("saving", "division"),
    }),
)  # fmt: skip
