"""Streams of turns: an answer follows from the stream, of the kind and the age that are said."""

from __future__ import annotations

import random

from pipeline.stateful.streams import (
    ANSWER,
    ASK,
    FILLERS,
    FIRST_FACTS,
    KEYS,
    KINDS,
    START,
    STOP,
    TURN,
    VALUES,
    WINDOW,
    Turn,
    draw_lengths,
    draw_lesson,
    draw_stream,
)

MANY = 60


def streams() -> list[list[Turn]]:
    rng = random.Random(7)
    lengths = draw_lengths(rng, 4 * WINDOW)
    return [draw_stream(rng, lengths) for _ in range(MANY)]


def facts(prompt: list[int]) -> list[tuple[int, int]]:
    """Of a prompt's ids alone; written apart from the generator, to check it."""
    words = [t for t in prompt if t not in FILLERS and t not in (START, TURN)]
    assert words[-2] == ASK and words[2:-2:3] == [STOP] * (len(words) // 3)
    return [(words[i], words[i + 1]) for i in range(0, len(words) - 2, 3)]


def test_a_turn_asks_for_a_fact_of_the_kind_that_it_says() -> None:
    for stream in streams():
        said = [dict(facts(turn.prompt)) for turn in stream]
        assert len(said[0]) == FIRST_FACTS and {len(some) for some in said[1:]} == {3}
        for number, turn in enumerate(stream):
            key = turn.prompt[-1]
            (stated,) = [n for n, some in enumerate(said) if key in some]
            assert turn.fact.value == said[stated][key] in VALUES and key in KEYS
            assert {
                "own": stated == number,
                "gist": stated == 0,
                "recent": 1 <= number - stated <= 2 and stated > 0,
                "mid": 0 < stated < number - 2,
            }[turn.kind]


def test_no_fact_is_asked_for_twice_and_kinds_take_turns() -> None:
    for stream in streams():
        asked = [turn.prompt[-1] for turn in stream]
        assert len(set(asked)) == len(asked)
        counts = [[turn.kind for turn in stream].count(kind) for kind in KINDS]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 8
        assert {turn.kind for turn in stream[:4]} == {"own"}


def test_turns_have_24_to_40_tokens_and_ages_count_them() -> None:
    for stream in streams():
        ids = [t for turn in stream for t in (*turn.prompt, turn.fact.value, STOP)]
        assert 4 * WINDOW <= len(ids) < 4 * WINDOW + 40
        place = 0
        for turn in stream:
            assert 24 <= len(turn.prompt) + ANSWER <= 40
            end = place + len(turn.prompt) - 1
            assert ids[end] == ids[end - turn.age] == ids[turn.fact.place] == turn.fact.key
            assert ids[turn.fact.place + 1] == turn.fact.value
            place += len(turn.prompt) + ANSWER


def test_streams_of_a_group_differ_in_all_but_their_lengths() -> None:
    first, second = streams()[:2]
    assert [len(turn.prompt) for turn in first] == [len(turn.prompt) for turn in second]
    assert [turn.prompt for turn in first] != [turn.prompt for turn in second]
    assert streams() == streams()


def test_a_lesson_asks_for_facts_of_all_ages_and_learns_answers_alone() -> None:
    rng = random.Random(9)
    ages = []
    for _ in range(MANY):
        ids, learned = draw_lesson(rng, WINDOW)
        assert len(ids) == len(learned) and WINDOW - 80 < len(ids) <= WINDOW
        meaning: dict[int, tuple[int, int]] = {}
        for i, token in enumerate(ids[:-1]):
            if token == ASK:
                value, place = meaning[ids[i + 1]]
                assert ids[i + 2 : i + 4] == [value, STOP]
                assert learned[i : i + 4] == [False, False, True, True]
                ages.append(i - place)
            elif token in KEYS and ids[i - 1] != ASK:
                meaning[token] = ids[i + 1], i
        assert sum(learned) == 2 * ids.count(ASK)
    assert min(ages) < 16 and max(ages) > 0.85 * WINDOW
    assert sum(age > WINDOW / 2 for age in ages) > 0.1 * len(ages)
