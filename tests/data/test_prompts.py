"""The committed prompts: what the generator makes, with the sharing that is promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout import COMMON_HEADER
from make_prompts import NUM_DUPLICATES, NUM_SINGLETONS, make_messages, make_plain

from .oracle import solve_messages, solve_plain

SEED = 1


@pytest.fixture(scope="module")
def plain(data_folder: Path) -> pa.Table:
    return pq.read_table(data_folder / "prompts.parquet")


@pytest.fixture(scope="module")
def chat(data_folder: Path) -> pa.Table:
    return pq.read_table(data_folder / "prompts_messages.parquet")


def test_the_files_are_what_the_seed_makes(plain: pa.Table, chat: pa.Table) -> None:
    assert plain.equals(make_plain(SEED))
    assert chat.equals(make_messages(SEED))
    assert not make_plain(SEED + 1).equals(plain)


def test_schema_and_counts(plain: pa.Table, chat: pa.Table) -> None:
    carried = {"id": pa.string(), "task": pa.string(), "customer_id": pa.string(),
               "answer": pa.string(), "max_new_tokens": pa.int32()}  # fmt: skip
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    for table, extra in ((plain, {"prompt": pa.string()}), (chat, {"messages": messages})):
        assert {field.name: field.type for field in table.schema} == carried | extra
        ids = table["id"].to_pylist()
        assert len(set(ids)) == len(ids)
        assert all(column.null_count == 0 for column in table.columns)
    assert plain.num_rows >= 2000
    assert chat.num_rows >= 200


def test_every_reference_answer_follows_from_its_prompt(plain: pa.Table, chat: pa.Table) -> None:
    for row in plain.to_pylist():
        assert solve_plain(row["task"], row["prompt"]) == row["answer"], row["id"]
    for row in chat.to_pylist():
        assert solve_messages(row["task"], row["messages"]) == row["answer"], row["id"]


def test_duplicates_and_singletons(plain: pa.Table) -> None:
    prompts = plain["prompt"].to_pylist()
    assert len(prompts) - len(set(prompts)) >= NUM_DUPLICATES >= 40
    alone = [prompt for prompt in prompts if not prompt.startswith(COMMON_HEADER)]
    assert len(alone) == NUM_SINGLETONS >= 40
    assert len({prompt.split(",")[0] for prompt in alone}) == NUM_SINGLETONS


def test_three_levels_of_sharing(plain: pa.Table) -> None:
    """Prompts of a header split into topics, those of a topic into items, those into questions."""
    shared = {prompt for prompt in plain["prompt"].to_pylist() if prompt.startswith(COMMON_HEADER)}
    headers = Counter("\n".join(prompt.split("\n")[:2]) for prompt in shared)
    topics: Counter[str] = Counter()
    items: Counter[str] = Counter()
    for prompt in shared:
        context = prompt.rsplit("\nAnswer: ", 1)[0].rsplit("\nQuestion: ", 1)[0]
        items[context] += 1
        for mark in ("\nTicket ", "\nOrder ", "\nNews of "):
            if mark in context:
                topics[context.split(mark)[0]] += 1
    assert sum(topics.values()) == len(shared)
    assert len(headers) < len(topics) / 5 < len(items) / 10 < len(shared) / 20
    assert min(items.values()) >= 2


def test_the_given_order_has_poor_locality(plain: pa.Table) -> None:
    tasks = plain["task"].to_pylist()
    changes = sum(a != b for a, b in zip(tasks, tasks[1:], strict=False))
    assert changes > len(tasks) / 2
