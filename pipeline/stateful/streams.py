"""Streams of turns that state facts and ask for them: what the study asks and its model learns.

```
start | k7 v3 ; k9 v1 ; ...           ? k4  v8 ;   the first turn: eleven facts
      | the k2 v9 ; and k8 v6 ; of ...  ? k7  v3 ;   later ones: three facts and filler
        user: facts, filler, question          answer
```

The bindings are drawn anew for every stream, and no fact is asked for twice, for an answer states
it again. What a turn may ask for:

| kind | a fact of |
|---|---|
| gist | the first turn |
| recent | one of the two turns before |
| mid | a turn between those |
| own | the turn itself; the first four ask nothing else |
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple, get_args

Kind = Literal["gist", "mid", "recent", "own"]
KINDS: tuple[Kind, ...] = get_args(Kind)[:3]
"""Those that are measured."""

WORDS = ["<end>", "<start>", "|", ";", "?", "<unknown>"]
END, START, TURN, STOP, ASK, UNKNOWN = range(6)
FILLERS = range(6, 32)
VALUES = range(32, 96)
KEYS = range(96, 288)
VOCABULARY = 288
WINDOW = 256
"""Tokens of the longest stream that the model has learnt."""
FIRST_FACTS, FACTS = 11, 3
"""Of the first turn, and of later ones."""
ANSWER = 2
"""Tokens of an answer: a value and `STOP`."""
_FILLER = range(10, 27)
_NOT_ASKED_BEFORE = 4  # turn from which on all kinds have something to ask for


class Fact(NamedTuple):
    """`place`: where its key stands in the stream, if all answers have `ANSWER` tokens."""

    key: int
    value: int
    turn: int
    place: int


class Turn(NamedTuple):
    """`prompt`: token ids of the user, the question at its end. `age`: tokens from the asked fact's
    key to the question's."""

    prompt: list[int]
    kind: Kind
    fact: Fact
    age: int


class Taught(NamedTuple):
    """Token ids of a sequence, and which of them are learned."""

    token_ids: list[int]
    learned: list[bool]


def draw_lengths(rng: random.Random, tokens: int) -> list[int]:
    """Filler words of each turn of a stream of about so many tokens, the first turn's 0."""
    lengths, total = [0], _first_turn()
    while total < tokens:
        lengths.append(rng.choice(_FILLER))
        total += _later_turn(lengths[-1])
    return lengths


def draw_stream(rng: random.Random, lengths: list[int]) -> list[Turn]:
    """Turns with so much filler each."""
    names = rng.sample(KEYS, FIRST_FACTS + FACTS * (len(lengths) - 1))
    open_facts: list[Fact] = []
    kinds: list[Kind] = []
    stream: list[Turn] = []
    place = 0
    for number, filler in enumerate(lengths):
        facts = FACTS if number else FIRST_FACTS
        ids, said = _state(rng, [names.pop() for _ in range(facts)], filler, (number, place))
        open_facts += said
        if number < _NOT_ASKED_BEFORE:
            kind: Kind = "own"
        else:
            kinds = kinds or rng.sample(KINDS, len(KINDS))
            kind = kinds.pop()
        fact = rng.choice([one for one in open_facts if _is_of(kind, one.turn, number)])
        open_facts.remove(fact)
        ids += [ASK, fact.key]
        stream.append(Turn(ids, kind, fact, place + len(ids) - 1 - fact.place))
        place += len(ids) + ANSWER
    return stream


def draw_lesson(rng: random.Random, tokens: int) -> Taught:
    """A sequence of at most so many tokens, turns of all shapes with one to four questions each,
    answered. Facts of all ages are asked for alike."""
    ids: list[int] = []
    learned: list[bool] = []
    open_facts: list[Fact] = []
    names = rng.sample(KEYS, len(KEYS))
    number = 0
    while True:
        facts = FIRST_FACTS if number == 0 and rng.random() < 0.7 else rng.randint(1, 5)
        filler = 0 if facts == FIRST_FACTS else rng.randrange(27)
        said, stated = _state(rng, [names.pop() for _ in range(facts)], filler, (number, len(ids)))
        open_facts += stated
        asked = _ask_any(rng, open_facts, rng.randint(1, 4))
        for fact in asked:
            open_facts.remove(fact)
            said += [ASK, fact.key, fact.value, STOP]
        if len(ids) + len(said) > tokens:
            return Taught(ids, learned)
        ids += said
        learned += [False] * (len(said) - 4 * len(asked)) + [False, False, True, True] * len(asked)
        number += 1


def vocabulary() -> list[str]:
    """The word of each token id."""
    words = [*WORDS, *(f"w{i}" for i in range(len(FILLERS)))]
    return words + [f"v{i}" for i in range(len(VALUES))] + [f"k{i}" for i in range(len(KEYS))]


def _state(
    rng: random.Random, names: list[int], filler: int, at: tuple[int, int]
) -> tuple[list[int], list[Fact]]:
    """Ids that state facts of these keys with filler between them; `at`: turn, its first place."""
    number, place = at
    ids = [TURN] if number else [START, TURN]
    gaps = [rng.randrange(len(names) + 1) for _ in range(filler)]
    facts = []
    for i, key in enumerate(names):
        ids += rng.choices(FILLERS, k=gaps.count(i))
        facts.append(Fact(key, rng.choice(VALUES), number, place + len(ids)))
        ids += [key, facts[-1].value, STOP]
    return ids + rng.choices(FILLERS, k=gaps.count(len(names))), facts


def _ask_any(rng: random.Random, facts: list[Fact], most: int) -> list[Fact]:
    """Different ones: half of them drawn from all, half from a turn that was drawn before."""
    left = list(facts)
    asked = []
    for _ in range(min(most, len(left))):
        some = left
        if rng.random() < 0.5:
            turn = rng.choice(sorted({fact.turn for fact in left}))
            some = [fact for fact in left if fact.turn == turn]
        asked.append(rng.choice(some))
        left.remove(asked[-1])
    return asked


def _is_of(kind: Kind, stated: int, now: int) -> bool:
    if kind == "own":
        return stated == now
    if kind == "gist":
        return stated == 0
    return 0 < now - stated <= 2 if kind == "recent" else 0 < stated < now - 2


def _first_turn() -> int:
    return 2 + 3 * FIRST_FACTS + 2 + ANSWER


def _later_turn(filler: int) -> int:
    return 1 + 3 * FACTS + filler + 2 + ANSWER
