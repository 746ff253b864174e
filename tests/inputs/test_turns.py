"""Which rows are which turns of which conversations, wherever they lie."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.conversation_settings import ConversationSettings
from pipeline.errors import InputError
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.inputs.turns import Turns
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.prompts import TurnPrompt
from tests.tiny_job import write_prompts

BY_CHAT = ConversationSettings(conversation_column="chat", turn_column="k")


def open_turns(
    path: Path, asked: ConversationSettings = BY_CHAT, **read: Any
) -> tuple[PromptSource, Turns]:
    settings = ReadSettings(**read)
    source = open_source(Location(path), settings, conversations=asked).with_turns()
    assert source.turns is not None
    return source, source.turns


def write(tmp_path: Path, chat: Any, k: Any, **columns: Any) -> Path:
    prompts = [f"p{row}" for row in range(len(chat))]
    return write_prompts(tmp_path / "in.parquet", prompts, chat=chat, k=k, **columns)


def conversations(turns: Turns) -> list[list[int]]:
    return [part.tolist() for part in np.split(turns.order, turns.bounds[1:-1])]


def test_turns_come_in_order_wherever_their_rows_lie(tmp_path: Path) -> None:
    """Numbers may have gaps, and may be negative."""
    path = write(tmp_path, ["a", "b", "a", "b", "a", "c"], [5, 0, -1, 9, 2, 7])
    source, turns = open_turns(path)
    assert conversations(turns) == [[2, 4, 0], [1, 3], [5]]
    assert turns.turn.tolist() == [5, 0, -1, 9, 2, 7] and not turns.faults
    assert turns.conversation.tolist() == [0, 1, 0, 1, 0, 2]
    (batch,) = source.iter_prompts()
    assert batch.contents == [TurnPrompt(f"p{row}", is_first=row in (1, 2, 5)) for row in range(6)]


@pytest.mark.parametrize(
    "ids", [[7, 7, -1], pa.array([7, 7, 2**63], pa.uint64()), ["", "", "\U0001f4a3\x1b[2J"]]
)
def test_ids_are_texts_or_integers(tmp_path: Path, ids: Any) -> None:
    _, turns = open_turns(write(tmp_path, ids, [1, 0, 0]))
    assert conversations(turns) == [[1, 0], [2]]


def test_columns_are_found_by_their_usual_names_once_one_is_asked_for(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "conversation_id": ["a", "a"],
        "turn": [1, 0],
        "chat": ["x", "y"],
        "k": [1, 2],
    }
    path = write_prompts(tmp_path / "in.parquet", ["p", "q"], **columns)
    by_id = ConversationSettings(conversation_column="conversation_id")
    assert conversations(open_turns(path, by_id)[1]) == [[1, 0]]
    assert conversations(open_turns(path, ConversationSettings(turn_column="k"))[1]) == [[0, 1]]
    source = open_source(Location(path), ReadSettings())
    assert source.columns.conversation is None and source.with_turns().turns is None
    (said,) = source.columns.describe()
    assert "unless --conversation-column asks for the columns conversation_id, turn" in said
    (batch,) = source.iter_prompts()
    assert batch.contents == ["p", "q"]


def test_other_columns_of_those_names_are_nothing_to_speak_of(tmp_path: Path) -> None:
    columns = {"conversation_id": ["a"], "turn": ["left"]}
    path = write_prompts(tmp_path / "in.parquet", ["p"], **columns)
    assert open_source(Location(path), ReadSettings()).columns.describe() == []


def test_another_tenants_conversation_of_the_same_id_is_another_one(tmp_path: Path) -> None:
    path = write(tmp_path, ["a", "a", "a", "a"], [0, 0, 1, 0], tenant=["x", "y", "x", None])
    assert conversations(open_turns(path)[1]) == [[0, 2], [1], [3]]


def test_whole_floats_are_numbers(tmp_path: Path) -> None:
    """As pandas writes integers with a gap."""
    _, turns = open_turns(write(tmp_path, ["a"] * 3, [2.0, None, 0.0]))
    assert turns.turn.tolist() == [2, 0, 0] and turns.faults.keys() == {1}


@pytest.mark.parametrize(
    ("number", "error_type"),
    [
        (pa.array([0.0, float("nan")]), "BadTurn"),
        (pa.array([0.0, float("inf")]), "BadTurn"),
        (pa.array([0.0, -(2.0**80)]), "BadTurn"),
        (pa.array([0.0, 1.5]), "BadTurn"),
        (pa.array([0, 2**63], pa.uint64()), "BadTurn"),
        (pa.array([0, None], pa.int64()), "NullTurn"),
        (pa.nulls(2), "NullTurn"),
    ],
)
def test_a_turn_that_is_no_number_is_an_error_of_its_row(
    tmp_path: Path, number: pa.Array, error_type: str
) -> None:
    source, turns = open_turns(write(tmp_path, ["a", "a"], number, temperature=[0.5, 0.5]))
    (batch,) = source.iter_prompts()
    bad = batch.rejected[-1]
    assert (bad.row_index, bad.error_type) == (1, error_type) and "'k'" in bad.message
    assert batch.contents[1] is None and batch.overrides[1] == {}
    placeless = [*turns.faults]
    assert turns.order[: len(placeless)].tolist() == placeless  # before all that may follow


def test_a_row_of_no_conversation_is_an_error(tmp_path: Path) -> None:
    source, turns = open_turns(write(tmp_path, ["a", None, "a", None], [0, 0, 1, 0]))
    assert conversations(turns) == [[0, 2]]
    (batch,) = source.iter_prompts()
    assert [bad.error_type for bad in batch.rejected] == ["NullConversation"] * 2


def test_what_a_row_is_refused_for_already_stays(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "in.parquet", [None, ""], chat=[None, "a"], k=[0, None])
    (batch,) = open_turns(path)[0].iter_prompts()
    assert [bad.error_type for bad in batch.rejected] == ["NullPrompt", "EmptyPrompt"]


def test_turns_that_come_twice_are_refused_with_their_rows(tmp_path: Path) -> None:
    path = write(tmp_path, ["a", "b" * 99, "a", "b" * 99, "a"], [3, 0, 3, 0, 3])
    with pytest.raises(InputError) as refused:
        open_turns(path)
    message = str(refused.value)
    assert "turn 3 of 'a' in the rows 0 and 2, turn 3 of 'a' in the rows 2 and 4" in message
    assert f"turn 0 of '{'b' * 40}...' in the rows 1 and 3" in message


@pytest.mark.parametrize(
    ("columns", "asked", "says"),
    [
        ({"k": [0]}, {"turn_column": "k"}, "no column 'conversation_id'"),
        ({"chat": ["a"]}, {"conversation_column": "chat"}, "name yours with --turn-column"),
        ({"chat": ["a"], "k": [0]}, {"conversation_column": "chats"}, "no column 'chats'"),
        ({"chat": ["a"], "k": ["0"]}, {}, "'k' of IN has the type large_string, not integer"),
        ({"chat": ["a"], "k": [True]}, {}, "has the type bool, not integer"),
        ({"chat": [1.5], "k": [0]}, {}, "has the type double, not string or integer"),
        ({"chat": [["a"]], "k": [0]}, {}, "not string or integer"),
        ({"chat": [1], "k": [0]}, {"turn_column": "chat"}, "cannot be conversation and turn"),
    ],
)
def test_columns_that_are_missing_or_of_another_type_are_refused(
    tmp_path: Path, columns: Any, asked: dict[str, str], says: str
) -> None:
    path = write_prompts(tmp_path / "IN", ["p"], **columns)
    settings = ConversationSettings(
        **(asked if "chat" not in columns else BY_CHAT.model_dump(exclude_defaults=True) | asked)
        if says != "name yours with --turn-column"
        else asked
    )
    with pytest.raises(InputError, match=says.replace("IN", ".*IN")):
        open_source(Location(path), ReadSettings(), conversations=settings)


def test_prompts_in_segments_are_no_turns(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    segments = [[{"role": "query", "text": "q"}]]
    pq.write_table(pa.table({"segments": segments, "chat": ["a"], "k": [0]}), path)
    with pytest.raises(InputError, match="are in segments, and turns of conversations are not"):
        open_source(Location(path), ReadSettings(), conversations=BY_CHAT)


def test_a_million_rows_take_about_a_second(tmp_path: Path) -> None:
    """On a machine that does nothing else; measured 1.0 s."""
    count, random = 1_000_000, np.random.default_rng(0)
    places = random.permutation(count)
    chat = pa.array([f"conversation-{n}" for n in (places % 100_000).tolist()])
    table = pa.table({"prompt": pa.array(["p"] * count), "chat": chat, "k": places // 100_000})
    pq.write_table(table, tmp_path / "in.parquet")
    started = time.process_time()
    _, turns = open_turns(tmp_path / "in.parquet")
    assert time.process_time() - started < 6
    print("seconds", time.process_time() - started)
    assert (np.diff(turns.bounds) == 10).all()
    assert (np.diff(turns.turn[turns.order].reshape(-1, 10)) == 1).all()
