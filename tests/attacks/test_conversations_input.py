"""Turns that nobody would write, wherever they lie."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, UsageError
from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, write_prompts

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def flat(model_folder: Path) -> dict[str, Any]:
    defaults = {"max_new_tokens": 4, "device": "cpu", "engine": "echo", "fail_on_error": "100%"}
    return defaults | {"model": str(model_folder), "turn_column": "turn"}


def plan(source: Path, flat: dict[str, Any], **more: Any) -> Any:
    return plan_job(str(source), JobSettings.from_flat(flat | more))


@pytest.mark.fault(
    "conversations",
    injected="10,000 turns of one conversation in an order of their own, by a chat template",
    outcome="planned in seconds, each turn once and in order",
)
def test_ten_thousand_turns(tmp_path: Path, flat: Any) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    order = np.random.default_rng(0).permutation(10_000).tolist()
    source = write_prompts(
        tmp_path / "in.parquet", ["hi"] * 10_000, conversation_id=["a"] * 10_000, turn=order
    )
    more = {"apply_chat_template": True, "chat_template": str(tmp_path / "chat.jinja")}
    more |= {"engine": "prefix", "evict": "window", "budget_tokens": 64}  # else most do not fit
    started = time.monotonic()
    found = plan(source, flat, **more)
    assert time.monotonic() - started < 60
    turns = found.plan.conversations
    assert len(turns.bounds) == 2
    assert [order[row] for row in turns.row.tolist()] == list(range(10_000))
    assert found.summary.conversations["most_turns"] == 10_000


@pytest.mark.fault(
    "conversations",
    injected="a conversation whose turns lie in several files, in no order, and a job in shards",
    outcome="kept whole: each shard has all of its turns, and each turn is answered once",
)
def test_turns_in_many_files_and_shards(tmp_path: Path, flat: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in range(5):
        rows = range(8)
        write_prompts(
            folder / f"{file}.parquet", [f"{file} {row}" for row in rows],
            id=[f"{file}-{row}" for row in rows],
            conversation_id=list(rows), turn=[(7 * file) % 5 for _ in rows],
        )  # fmt: skip
    seen = []
    for shard in range(3):
        output = tmp_path / f"out{shard}"
        settings = JobSettings.from_flat(flat | {"num_shards": 3, "shard": shard})
        run_job(str(folder), output, settings)
        seen.append(answers(output).select("conversation_id", "turn", "status"))
    whole = pl.concat(seen)
    assert whole["status"].to_list() == ["ok"] * 40
    assert whole.group_by("conversation_id").len()["len"].to_list() == [5] * 8
    sets = [set(part["conversation_id"].to_list()) for part in seen]
    assert sum(map(len, sets)) == 8


@pytest.mark.fault(
    "conversations",
    injected="a conversation of another tenant with the same id and the same turns",
    outcome="two conversations, which share no token",
)
def test_the_same_id_of_another_tenant(tmp_path: Path, flat: Any) -> None:
    source = write_prompts(
        tmp_path / "in.parquet", ["hello", "hello", "you", "you"],
        conversation_id=["a"] * 4, turn=[0, 0, 1, 1], tenant=["x", "y", "y", "x"],
    )  # fmt: skip
    found = plan(source, flat)
    turns = found.plan.conversations
    rows = {tuple(turns.row[list(turns.turns(s))].tolist()) for s in range(2)}
    assert rows == {(0, 3), (1, 2)} and found.plan.tree.edge_lengths.sum() == 10


@pytest.mark.fault(
    "conversations",
    injected="turns that are NaN, infinite, 2^63, halves, null; ids that are null",
    outcome="each an error of its row, and of its conversation, whose order nobody knows",
)
@pytest.mark.parametrize(
    ("numbers", "error_type"),
    [
        (pa.array([0.0, float("nan")]), "BadTurn"),
        (pa.array([0.0, float("-inf")]), "BadTurn"),
        (pa.array([0.0, 0.5]), "BadTurn"),
        (pa.array([0, 2**63], pa.uint64()), "BadTurn"),
        (pa.array([0, 2**64 - 1], pa.uint64()), "BadTurn"),
        (pa.array([0, None]), "NullTurn"),
        (pa.array([0.0, None], pa.float16()), "NullTurn"),
    ],
)
def test_turns_that_are_no_numbers(
    tmp_path: Path, flat: Any, numbers: pa.Array, error_type: str
) -> None:
    table = pa.table({"prompt": ["p", "q"], "conversation_id": ["a", "a"], "turn": numbers})
    others = pa.table({"prompt": ["r"], "conversation_id": ["b"], "turn": numbers[:1]})
    pq.write_table(pa.concat_tables([table, others]), tmp_path / "in.parquet")
    run_job(str(tmp_path / "in.parquet"), tmp_path / "out", JobSettings.from_flat(flat))
    found = answers(tmp_path / "out")
    assert found["error_type"].to_list() == ["PriorTurnFailed", error_type, None]


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 0])
def test_the_largest_and_the_smallest_turns_are_turns(
    tmp_path: Path, flat: Any, number: int
) -> None:
    source = write_prompts(
        tmp_path / "in.parquet", ["p", "q"], conversation_id=["a", "a"], turn=[number, 1]
    )
    found = plan(source, flat)
    assert not found.rejected
    assert found.plan.conversations.row.tolist() == ([1, 0] if number > 1 else [0, 1])


@pytest.mark.fault(
    "conversations",
    injected="a column of turns that are texts, truths, lists or times; ids that are floats",
    outcome="refused before a row is read, exit code 2, naming the column and its type",
)
@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("turn", ["1", "2"]), ("turn", [True, False]), ("turn", [[1], [2]]),
        ("turn", [{"n": 1}, {"n": 2}]), ("turn", pa.array([1, 2], pa.timestamp("s"))),
        ("conversation_id", [1.0, 2.0]), ("conversation_id", [b"a", b"b"]),
        ("conversation_id", [{"a": 1}] * 2),
    ],
)  # fmt: skip
def test_columns_of_other_types(tmp_path: Path, flat: Any, column: str, cells: Any) -> None:
    columns: dict[str, Any] = {"conversation_id": ["a", "a"], "turn": [0, 1], column: cells}
    source = write_prompts(tmp_path / "in.parquet", ["p", "q"], **columns)
    with pytest.raises(InputError, match=f"column '{column}' of .* has the type"):
        plan(source, flat)


HOSTILE = [
    "", " ", "\x00", "\x1b[2J\x07", "../../etc", "a\n", "\xe9", "e\u0301", "'; drop",
    "x" * 100_000,
]  # fmt: skip


@pytest.mark.fault(
    "conversations",
    injected="ids of conversations that are empty, of control characters, paths, 100,000 long",
    outcome="texts like any; a message that names one acts on no terminal and is short",
)
def test_hostile_ids_are_ids(tmp_path: Path, flat: Any) -> None:
    source = write_prompts(
        tmp_path / "in.parquet", ["p"] * 20, conversation_id=HOSTILE * 2, turn=[0] * 10 + [1] * 10
    )
    found = plan(source, flat)
    assert len(found.plan.sequences) == len(HOSTILE) and not found.rejected
    twice = write_prompts(
        tmp_path / "twice.parquet", ["p"] * 20, conversation_id=HOSTILE * 2, turn=[0] * 20
    )
    with pytest.raises(InputError) as refused:
        plan(twice, flat)
    message = str(refused.value)
    assert "rows 0 and 10" in message and "and 7 more" in message and len(message) < 400
    assert "\x1b" not in message and "\x00" not in message and "\n" not in message


def test_a_long_id_that_comes_twice_is_cut_in_the_message(tmp_path: Path, flat: Any) -> None:
    source = write_prompts(
        tmp_path / "in.parquet", ["p"] * 2, conversation_id=["\x1b" * 9999] * 2, turn=[0, 0]
    )
    with pytest.raises(InputError) as refused:
        plan(source, flat)
    assert len(str(refused.value)) < 500


@pytest.mark.fault(
    "conversations",
    injected="a chat template that moves, drops, numbers or forgets what was said before",
    outcome="refused before a row is read, exit code 2, in a sentence",
)
@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("m.content", "(m.content.split('</think>') | last)"),
        TEMPLATE.replace("'assistant: '", "'assistant: <think>'"),
        TEMPLATE.replace("m.role +", "m.role + loop.revindex | string +"),
        TEMPLATE.replace("m.role +", "m.role + (loop.index // 20) | string +"),
        TEMPLATE.replace("in messages", "in messages | reverse"),
        TEMPLATE.replace("{% for", "{{ messages | length }}{% for"),
    ],
)
def test_templates_that_rewrite_history(tmp_path: Path, flat: Any, template: str) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    source = write_prompts(tmp_path / "in.parquet", ["p"], conversation_id=["a"], turn=[0])
    more = {"apply_chat_template": True, "chat_template": str(tmp_path / "chat.jinja")}
    with pytest.raises(UsageError, match="go on from the KV of the turns before it"):
        plan(source, flat, **more)
    assert not plan(source, {n: v for n, v in flat.items() if n != "turn_column"}, **more).rejected


def test_messages_that_look_like_the_stand_in_stay_text(tmp_path: Path, flat: Any) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    texts = ["\ue000", "\ue001", "\ue001\ue001 \ue000", "assistant: \ue001"]
    messages = [[{"role": "user", "content": text}] for text in texts]
    table = {"messages": messages, "conversation_id": ["a"] * 4, "turn": [0, 1, 2, 3]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    found = plan(tmp_path / "in.parquet", flat, chat_template=str(tmp_path / "chat.jinja"))
    lengths = [len(f"user: {text}\nassistant: ") + (row > 0) for row, text in enumerate(texts)]
    assert not found.rejected and found.plan.table.lengths.tolist() == lengths


@pytest.mark.fault(
    "conversations",
    injected="messages of a turn that are none, of a system, of an unknown role, null, not text",
    outcome="errors of their rows, and PriorTurnFailed behind them",
)
def test_messages_that_are_none(tmp_path: Path, flat: Any) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    cells = [
        '[{"role": "user", "content": "hi"}]', "[]", "null", '{"role": "user"}', "[[[",
        '[{"role": "system", "content": "be"}]', None,
    ]  # fmt: skip
    columns = {"conversation_id": [*range(7), *range(7)], "turn": [0] * 7 + [1] * 7}
    first, *bad = cells
    table = pa.table({"messages": [first] * 7 + [first, *bad], **columns})
    pq.write_table(table, tmp_path / "in.parquet")
    found = plan(tmp_path / "in.parquet", flat, chat_template=str(tmp_path / "chat.jinja"))
    kinds = {row: error.error_type for row, error in found.rejected.items()}
    assert kinds == dict.fromkeys(range(8, 13), "BadMessages") | {13: "NullPrompt"}


def test_json_lines_have_turns_as_well(tmp_path: Path, flat: Any) -> None:
    rows = [
        {"id": str(n), "prompt": f"p{n}", "conversation_id": "a", "turn": turn}
        for n, turn in enumerate([3, 1, 2])
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plan(source, flat).plan.conversations.row.tolist() == [1, 2, 0]


def test_a_limit_cuts_conversations_like_any_rows(tmp_path: Path, flat: Any) -> None:
    source = write_prompts(
        tmp_path / "in.parquet", ["p"] * 4, conversation_id=["a", "b"] * 2, turn=[1, 1, 0, 0]
    )
    assert plan(source, flat, limit=3).plan.conversations.row.tolist() in ([1, 2, 0], [2, 0, 1])


def test_a_file_in_which_nothing_is_a_turn_is_written_all_the_same(
    tmp_path: Path, flat: Any
) -> None:
    source = write_prompts(
        tmp_path / "in.parquet", ["p", "q"], conversation_id=[None, None], turn=[None, None]
    )
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    found = answers(tmp_path / "out")
    assert found["error_type"].to_list() == ["NullConversation"] * 2
    assert found["conversation_id"].is_null().all() and found["turn"].is_null().all()


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.float32()])
def test_numbers_of_any_width_are_turns(tmp_path: Path, flat: Any, kind: pa.DataType) -> None:
    numbers = pa.array([2, 0, 1]).cast(kind)
    ids = pa.array(["a", "a", "a"]).dictionary_encode()
    table = pa.table({"prompt": ["c", "a", "b"], "conversation_id": ids, "turn": numbers})
    pq.write_table(table, tmp_path / "in.parquet")
    run_job(str(tmp_path / "in.parquet"), tmp_path / "out", JobSettings.from_flat(flat))
    found = answers(tmp_path / "out")
    assert found["status"].to_list() == ["ok"] * 3 and found["turn"].to_list() == [2, 0, 1]
    assert found["prompt_tokens"].to_list()[1] == 1 < found["prompt_tokens"].to_list()[0]


def test_a_column_of_a_folders_name_is_a_conversation(tmp_path: Path, flat: Any) -> None:
    for name in ("a", "b"):
        folder = tmp_path / "in" / f"conversation_id={name}"
        folder.mkdir(parents=True)
        write_prompts(folder / "x.parquet", ["p", "q"], id=[f"{name}1", f"{name}0"], turn=[1, 0])
    found = plan(tmp_path / "in", flat)
    assert sorted(found.plan.conversations.row.tolist()) == [0, 1, 2, 3]
    assert len(found.plan.sequences) == 2 and not found.rejected


def test_columns_named_like_those_of_the_output_come_back(tmp_path: Path, flat: Any) -> None:
    """A column `turn` that is none of ours is carried under another name."""
    source = write_prompts(
        tmp_path / "in.parquet", ["p"], chat=["x"], step=[3], turn=["left"], conversation_id=[1.5]
    )
    more = {"conversation_column": "chat", "turn_column": "step"}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat | more))
    (row,) = answers(tmp_path / "out").to_dicts()
    assert (row["conversation_id"], row["turn"]) == ("x", 3)
    assert (row["input_conversation_id"], row["input_turn"]) == (1.5, "left")
    assert (row["chat"], row["step"]) == ("x", 3)
