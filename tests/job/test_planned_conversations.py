"""Conversations from the input to the plan: which turns run, what they add, what is refused."""

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
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.tables import validation_table
from pipeline.engine.base import EngineCapabilities
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import EngineError, UsageError
from pipeline.inputs.turns import Turns
from pipeline.job.conversations import chain
from pipeline.job.job import open_job
from pipeline.job.planning import PlannedJob, plan_rows
from pipeline.plan.conversations import ConversationPlan, Eviction
from pipeline.prompts import Rejected
from pipeline.run import run_job, validate_input
from pipeline.settings import JobSettings
from tests.job.preparing import fail_after, watch_prepared
from tests.tiny_job import answers, on, write_prompts, write_tokenizer

CHATML = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHATS = ["a", "b", "a", "b", "a", "c"]
NUMBERS = [5, 0, -1, 9, 2, 7]
TEXTS = ["third", "hello", "first", "you?", "second", "alone"]


@pytest.fixture
def flat(model_folder: Path) -> dict[str, Any]:
    defaults = {"max_new_tokens": 4, "rows_per_part": 2, "device": "cpu"}
    return defaults | {"model": str(model_folder), "conversation_column": "conversation_id"}


def write(
    path: Path, texts: Any = TEXTS, chats: Any = CHATS, turns: Any = NUMBERS, **more: Any
) -> Path:
    return write_prompts(path, texts, conversation_id=chats, turn=turns, **more)


def planned(source: Path, flat: dict[str, Any], **more: Any) -> PlannedJob:
    return plan_rows(open_job(str(source), JobSettings.from_flat(flat | more)))


def turns_of(job: PlannedJob) -> ConversationPlan:
    found = job.plan.conversations
    assert found is not None
    return found


def rows_of(job: PlannedJob) -> list[list[int]]:
    turns = turns_of(job)
    return sorted(turns.row[list(turns.turns(s))].tolist() for s in range(len(turns.bounds) - 1))


def text_of(job: PlannedJob, row: int) -> str:
    (text,) = job.job.tokenizer.decode_batch([job.plan.table[row].tolist()])
    return text


def reasons(job: PlannedJob) -> dict[int, str]:
    return {row: bad.error_type for row, bad in sorted(job.rejected.items())}


def test_each_conversation_is_a_sequence_of_its_turns(tmp_path: Path, flat: Any) -> None:
    job = planned(write(tmp_path / "in.parquet"), flat)
    assert rows_of(job) == [[1, 3], [2, 4, 0], [5]] and not job.rejected
    assert [text_of(job, row) for row in range(6)] == TEXTS
    assert turns_of(job).eviction == Eviction(budget_tokens=115, window=128)
    first = "".join(map(str, ("first", "hello", "alone")))
    assert job.plan.tokens_to_compute(np.arange(3)) == len(first) + sum(
        len(TEXTS[row]) + 1 for row in (0, 3, 4)
    )


def test_sampling_fields_are_those_of_each_turn(tmp_path: Path, flat: Any) -> None:
    job = planned(write(tmp_path / "in.parquet", temperature=[0.5, 0.0, 0.0, 1.0, 0.0, 0.0]), flat)
    turns = turns_of(job)
    by_row = dict(zip(turns.row.tolist(), turns.params.tolist(), strict=True))
    assert [job.plan.params[by_row[row]].temperature for row in range(6)] == [0.5, 0, 0, 1, 0, 0]
    keys = dict(zip(turns.row.tolist(), turns.noise_key.tolist(), strict=True))
    assert keys[0] and keys[3] and not keys[1]


def test_turns_by_a_template_add_what_stands_behind_the_answer(tmp_path: Path, flat: Any) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    source = write(tmp_path / "in.parquet")
    more = {"apply_chat_template": True, "chat_template": str(template), "system_prompt": "be kind"}
    job = planned(source, flat, **more)
    assert text_of(job, 2) == "system: be kind\nuser: first\nassistant: "
    assert text_of(job, 4) == "\nuser: second\nassistant: "
    own = "system: be kind\n"
    assert turns_of(job).system_tokens.tolist() == [len(own)] * 3


def test_a_prompt_template_makes_the_text_of_a_turn(tmp_path: Path, flat: Any) -> None:
    template = tmp_path / "prompt.j2"
    template.write_text("{{ prompt }} says {{ conversation_id }}")
    job = planned(write(tmp_path / "in.parquet"), flat, template=str(template))
    assert text_of(job, 0) == "third says a" and rows_of(job) == [[1, 3], [2, 4, 0], [5]]


@pytest.mark.fault(
    "conversations",
    injected="a null text in the third of five turns",
    outcome="that turn is an error, its later ones PriorTurnFailed; earlier ones and others run",
)
def test_a_failed_turn_fails_its_later_ones_alone(tmp_path: Path, flat: Any) -> None:
    texts = ["one", "two", None, "four", "five", "other"]
    source = write(tmp_path / "in.parquet", texts, ["a"] * 5 + ["b"], [1, 2, 4, 6, 8, 0])
    job = planned(source, flat)
    assert rows_of(job) == [[0, 1], [5]]
    assert reasons(job) == {2: "NullPrompt", 3: "PriorTurnFailed", 4: "PriorTurnFailed"}
    assert "turn 4 of its conversation (row 2) cannot run" in job.rejected[4].message
    assert job.plan.sequence_of_row.tolist() == [0, 0, -1, -1, -1, 1] or (
        job.plan.sequence_of_row.tolist() == [1, 1, -1, -1, -1, 0]
    )
    assert job.plan.table.lengths.tolist() == [3, 3, 0, 0, 0, 5]


def test_a_failed_first_turn_leaves_nothing_of_its_conversation(tmp_path: Path, flat: Any) -> None:
    job = planned(write(tmp_path / "in.parquet", ["", "b", "c"], ["a", "a", "b"], [0, 1, 0]), flat)
    assert rows_of(job) == [[2]] and reasons(job) == {0: "EmptyPrompt", 1: "PriorTurnFailed"}


@pytest.mark.fault(
    "conversations",
    injected="a row whose turn is null",
    outcome="it is an error, and so are all turns of its conversation: nobody knows what precedes",
)
def test_a_turn_without_a_place_takes_its_conversation_with_it(tmp_path: Path, flat: Any) -> None:
    job = planned(write(tmp_path / "in.parquet", ["p"] * 3, ["a", "a", "b"], [0, None, 0]), flat)
    assert rows_of(job) == [[2]] and reasons(job) == {0: "PriorTurnFailed", 1: "NullTurn"}
    assert "the row 1 of its conversation has no place" in job.rejected[0].message


def test_no_row_that_can_run_is_an_empty_plan(tmp_path: Path, flat: Any) -> None:
    job = planned(write(tmp_path / "in.parquet", ["p", "q"], [None, None], [0, 0]), flat)
    assert rows_of(job) == [] and reasons(job) == {0: "NullConversation", 1: "NullConversation"}


def long(length: int) -> str:
    return "a" * length


@pytest.mark.parametrize(
    ("more", "lengths", "failed"),
    [
        ({}, [100, 26, 1], {}),
        ({}, [100, 27, 1], {2: "ContextExceeded"}),
        ({}, [127, 127, 1], {1: "ContextExceeded", 2: "PriorTurnFailed"}),
        ({}, [128, 1, 1], {0: "TurnTooLong", 1: "PriorTurnFailed", 2: "PriorTurnFailed"}),
        ({}, [1, 128, 1], {1: "TurnTooLong", 2: "PriorTurnFailed"}),
        ({"evict": "oldest", "budget_tokens": 60}, [59, 59, 1], {}),
        ({"evict": "oldest", "budget_tokens": 60}, [59, 60, 1], {1: "TurnTooLong", 2: "Prior"}),
        ({"evict": "oldest", "budget_tokens": 60}, [60, 1, 1], {0: "TurnTooLong", 1: "P", 2: "P"}),
    ],
)
def test_a_turn_that_fits_nowhere_is_an_error_before_the_run(
    tmp_path: Path, flat: Any, more: Any, lengths: list[int], failed: dict[int, str]
) -> None:
    source = write(tmp_path / "in.parquet", list(map(long, lengths)), ["a"] * 3, [0, 1, 2])
    found = reasons(planned(source, flat, **more))
    assert found.keys() == failed.keys()
    assert all(found[row].startswith(kind) for row, kind in failed.items())


def test_what_always_stays_leaves_a_turn_less_room(tmp_path: Path, flat: Any) -> None:
    """The system message stays, but where only the last tokens do."""
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    more = {"apply_chat_template": True, "chat_template": str(template), "system_prompt": long(30)}
    source = write(tmp_path / "in.parquet", ["hi", long(40)], ["a"] * 2, [0, 1])
    added = len("\nuser: ") + 40 + len("\nassistant: ")
    stays = len("system: ") + 30 + 1
    needed = stays + added + 1
    for evictor, budget, fails in (
        ("oldest", needed, False), ("oldest", needed - 1, True), ("window", needed - 1, False),
    ):  # fmt: skip
        job = planned(source, flat, **more, evict=evictor, budget_tokens=budget)
        assert bool(job.rejected) == fails
    failed = planned(source, flat, **more, evict="oldest", budget_tokens=needed - 1).rejected[1]
    assert f"beside the {stays} that always stay there is room for {added - 1}" in failed.message


@pytest.mark.fault(
    "conversations",
    injected="a budget that is too small for an answer, or larger than the context",
    outcome="refused before a row is read, exit code 2, naming the least that works",
)
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"evict": "oldest", "budget_tokens": 129}, "exceeds the model's context of 128 tokens"),
        ({"evict": "oldest", "budget_tokens": 35}, "raise --budget-tokens to 36, or lower"),
        ({"evict": "sink-recent", "budget_tokens": 39}, "raise --budget-tokens to 40"),
        ({"evict": "gist"}, "a budget of 115 tokens is too small for 512 first tokens that stay"),
        (
            {"evict": "oldest", "max_new_tokens": 200},
            "is too small for 0 first tokens that stay, 32 others",
        ),
    ],
)
def test_a_budget_that_cannot_work_is_refused(
    tmp_path: Path, flat: Any, more: Any, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        planned(write(tmp_path / "in.parquet"), flat, **more)


def test_a_system_prompt_that_fills_the_budget_is_refused(tmp_path: Path, flat: Any) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    more = {"apply_chat_template": True, "chat_template": str(template), "system_prompt": long(50)}
    source = write(tmp_path / "in.parquet")
    rendered = len("system: ") + 50 + len("\nassistant: ")
    least = rendered + 32 + 4
    with pytest.raises(UsageError, match=f"{rendered} first tokens .* to {least}, or lower"):
        planned(source, flat, **more, evict="oldest", budget_tokens=least - 1)
    assert not planned(source, flat, **more, evict="oldest", budget_tokens=least).rejected
    assert planned(source, flat, **more, evict="window", budget_tokens=40).rejected  # first turns


def test_a_budget_that_just_works_is_taken(tmp_path: Path, flat: Any) -> None:
    source = write(tmp_path / "in.parquet")
    more = {"evict": "sink-recent", "sink_tokens": 2, "positions": "gap", "seed": 7}
    job = planned(source, flat, **more, budget_tokens=38)
    assert turns_of(job).eviction == Eviction(
        "sink-recent", 38, 128, sink_tokens=2, positions="gap", seed=7
    )


BY_LENGTH = {"generation_options": {"max_length": 50}, "max_new_tokens": None}
"""As where a model's generation_config.json says it."""


def test_a_whole_length_that_the_model_allows_ends_no_conversation_that_evicts(
    tmp_path: Path, flat: Any
) -> None:
    evicting = BY_LENGTH | {"evict": "oldest", "budget_tokens": 100}
    with pytest.raises(UsageError, match="max_length .* --evict oldest .* choose --max-new-tokens"):
        planned(write(tmp_path / "in.parquet"), flat, **evicting)


@pytest.mark.fault(
    "conversations",
    injected="turns that reach the model's window, or its max_length, however short answers are",
    outcome="ContextExceeded before the run, later ones PriorTurnFailed; the plan says how many",
)
def test_a_history_that_must_exceed_what_the_model_allows_is_an_error_before_the_run(
    tmp_path: Path, flat: Any
) -> None:
    texts = [*map(long, (30, 15, 5, 1)), None, long(49), "hi"]
    chats, numbers = ["a"] * 4 + ["b"] * 3, [0, 1, 2, 3, 0, 1, 2]
    source = write(tmp_path / "in.parquet", texts, chats, numbers)
    job = planned(source, flat, **BY_LENGTH)
    prior = "PriorTurnFailed"
    assert reasons(job) == {2: "ContextExceeded", 3: prior, 4: "NullPrompt", 5: prior, 6: prior}
    assert "has at least 50 tokens with this turn, and the max_length" in job.rejected[2].message
    assert turns_of(job).row.tolist() == [0, 1] and job.plan.most_tokens.tolist() == [50]
    said = job.summary.conversations
    assert said is not None and said["turns_beyond_length"] == 1 and "max_length" in said["text"]
    assert (said["longest_tokens"], said["resent_tokens"]) == (50, 30 + 50)
    without = planned(source, flat, max_new_tokens=1)
    assert reasons(without) == {4: "NullPrompt", 5: prior, 6: prior}


def test_conversations_stay_whole_in_shards(tmp_path: Path, flat: Any) -> None:
    chats = [f"c{n % 20}" for n in range(100)]
    source = write(tmp_path / "in.parquet", ["hello"] * 100, chats, list(range(100)))
    seen: list[int] = []
    for shard in range(3):
        job = planned(source, flat, num_shards=3, shard=shard)
        ours = job.rows.tolist()
        assert {chats[row] for row in ours} & {chats[row] for row in seen} == set()
        seen += ours
    assert sorted(seen) == list(range(100))


class Lonely(EchoEngine):
    """Knows no conversations."""

    capabilities = EngineCapabilities()


def test_an_engine_that_answers_no_conversations_says_so(tmp_path: Path, flat: Any) -> None:
    source, settings = write(tmp_path / "in.parquet"), JobSettings.from_flat(flat)
    with pytest.raises(EngineError, match="answers no conversations; choose --engine prefix"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(Lonely()))


def test_every_row_is_answered_or_says_why_not(tmp_path: Path, flat: Any) -> None:
    """Through the echo engine, which answers with the end of all ids so far."""
    texts = ["one", None, "three", "four", "five"]
    source = write(tmp_path / "in.parquet", texts, ["a", "a", "a", "b", "b"], [0, 1, 2, 8, 3])
    settings = JobSettings.from_flat(flat | {"engine": "echo", "fail_on_error": "50%"})
    run_job(str(source), tmp_path / "out", settings)
    found = answers(tmp_path / "out")
    assert found["error_type"].to_list() == [None, "NullPrompt", "PriorTurnFailed", None, None]
    assert found["conversation_id"].to_list() == ["a", "a", "a", "b", "b"]
    assert found["turn"].to_list() == [0, 1, 2, 8, 3]


def naive_chain(turns: Turns, rejected: set[int]) -> tuple[list[list[int]], set[int]]:
    runs, followers = [], set()
    for low, high in zip(turns.bounds[:-1].tolist(), turns.bounds[1:].tolist(), strict=True):
        rows = turns.order[low:high].tolist()
        end = next((n for n, row in enumerate(rows) if row in rejected), len(rows))
        runs.append(rows[:end])
        followers |= set(rows[end:]) - rejected
    return [part for part in runs if part], followers


@pytest.mark.parametrize("seed", range(20))
def test_chains_are_those_of_a_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 60))
    conversation = np.sort(random.integers(0, 9, count))
    conversation = np.unique(conversation, return_inverse=True)[1]
    order = random.permutation(count)
    bounds = np.searchsorted(conversation, np.arange(conversation.max() + 2))
    unsorted, turn = np.empty(count, np.int64), np.empty(count, np.int64)
    unsorted[order], turn[order] = conversation, np.arange(count)
    is_first = np.zeros(count, bool)
    is_first[order[bounds[:-1]]] = True
    turns = Turns(unsorted, turn, order, bounds, is_first, {})
    failed = set(np.flatnonzero(random.random(count) < 0.2).tolist())
    rejected = {row: Rejected(row, "X", "y") for row in failed}
    chains, later = chain(turns, rejected, np.arange(count))
    runs, followers = naive_chain(turns, failed)
    found = np.split(chains.row, chains.bounds[1:-1]) if len(chains.bounds) > 1 else []
    assert [part.tolist() for part in found] == runs and later.keys() == followers
    assert chains.system_tokens.tolist() == [part[0] for part in runs]
    for row, bad in later.items():
        cause = int(bad.message.split("(row ")[1].split(")")[0])
        assert cause in failed and turn[cause] < turn[row]


def test_a_killed_plan_goes_on(tmp_path: Path, flat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inputs import parquet_input
    from pipeline.job.planning_checkpoint import Checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Checkpoint, "every_rows", 4)
    monkeypatch.setattr(parquet_input, "BATCH_ROWS", 4)
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    messages = [[{"role": "user", "content": f"{n}"}] for n in range(12)]
    for row in range(0, 12, 4):
        messages[row].insert(0, {"role": "system", "content": long(row + 1)})
    columns = {"conversation_id": [n // 4 for n in range(12)], "turn": list(range(12))}
    pq.write_table(pa.table({"messages": messages, **columns}), tmp_path / "in.parquet")
    flat = flat | {"chat_template": str(template)}
    with monkeypatch.context() as patch:
        fail_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            planned(tmp_path / "in.parquet", flat)
    with monkeypatch.context() as patch:
        prepared = watch_prepared(patch)
        again = planned(tmp_path / "in.parquet", flat)
    assert prepared and min(prepared) > 0
    whole = planned(tmp_path / "in.parquet", flat | {"min_prefix_tokens": 15})
    assert again.summary.plan_hash == whole.summary.plan_hash
    assert sorted(turns_of(again).system_tokens.tolist()) == [
        len("system: \n") + n for n in (1, 5, 9)
    ]


def test_a_hundred_thousand_conversations_are_chained_in_about_a_second() -> None:
    count = 1_000_000
    conversation = np.repeat(np.arange(100_000), 10)
    rows = np.arange(count)
    is_first = rows % 10 == 0
    turns = Turns(conversation, rows % 10, rows, np.arange(0, count + 1, 10), is_first, {})
    rejected = {row: Rejected(row, "X", "y") for row in range(0, count, 5000)}
    started = time.process_time()
    chains, later = chain(turns, rejected, np.zeros(count, np.int64))
    assert time.process_time() - started < 3
    assert len(later) == 9 * 200 and len(chains.row) == count - 2000
    print("seconds", time.process_time() - started)


def test_a_person_sees_what_the_first_conversation_adds(tmp_path: Path, flat: Any) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    settings = JobSettings.from_flat(
        flat | {"apply_chat_template": True, "chat_template": str(template)}
    )
    source = write(tmp_path / "in.parquet", [None, *TEXTS[1:]])
    found = validate_input(str(source), settings)
    assert found["first"]["id"] == "r1" and found["first"]["rendered"].startswith("user: hello")
    (piece,) = found["first_conversation"]
    assert (piece["turn"], piece["id"]) == (9, "r3")
    assert piece["added"] == "\nuser: you?\nassistant: "
    assert len(piece["token_ids"]) == len(piece["added"])
    table = dict(validation_table(found))
    assert table["turn 9, adds"] == piece["added"] and "token ids" in table["  r3"]


def test_pieces_are_shown_in_order_of_turns_and_not_of_rows(tmp_path: Path, flat: Any) -> None:
    source = write(tmp_path / "in.parquet", ["c", "d", "a", "b"], ["x"] * 4, [2, 3, 0, 1])
    found = validate_input(str(source), JobSettings.from_flat(flat))
    assert found["first"]["rendered"] == "a"
    assert [piece["added"] for piece in found["first_conversation"]] == ["b", "c", "d"]


def test_the_plan_shows_conversations_to_people_and_programs(tmp_path: Path, flat: Any) -> None:
    source = write(tmp_path / "in.parquet")
    call = ["plan", str(source), "--model", flat["model"], "--conversation-column"]
    call += ["conversation_id", "--max-new-tokens", "50", "--kv-budget", "1MiB"]
    shown = CliRunner().invoke(app, [*call, "--html", str(tmp_path / "plan.html")])
    assert shown.exit_code == 0, shown.exception
    for text in (
        "3 with 6 turns",
        "as many as 1 turns may exceed",
        "beyond 128",
        "sent again",
        "conversations at once 3",
    ):
        assert text in " ".join(shown.output.split()), text
    page = (tmp_path / "plan.html").read_text()
    assert "<h2>Conversations</h2>" in page and "sent again with each turn" in page
    told = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)["conversations"]
    assert (told["conversations"], told["turns"], told["turns_beyond_window"]) == (3, 6, 1)
    assert told["state_bytes"] and told["at_once"] == 3
    evicting = CliRunner().invoke(app, [*call, "--evict", "oldest", "--budget-tokens", "100"])
    assert "at most 3 turns, by oldest" in " ".join(evicting.output.split()), evicting.output


def test_the_library_takes_the_settings_as_any(tmp_path: Path, flat: Any) -> None:
    import kvcoppice

    flat = {name: value for name, value in flat.items() if name != "model"}
    frame = pl.read_parquet(write(tmp_path / "in.parquet"))
    found = kvcoppice.plan(frame, model=write_tokenizer(tmp_path / "m"), engine="echo", **flat)
    assert found.summary["conversations"]["turns"] == 6
    with pytest.raises(UsageError, match="--evict is for conversations"):
        kvcoppice.plan(frame, model=tmp_path / "m", engine="echo", evict="gist")


def test_it_is_said_that_messages_are_the_new_ones_alone(tmp_path: Path, flat: Any) -> None:
    messages = [[{"role": "user", "content": "hi"}]]
    table = pa.table({"messages": messages, "conversation_id": ["a"], "turn": [0]})
    pq.write_table(table, tmp_path / "in.parquet")
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    job = planned(tmp_path / "in.parquet", flat, chat_template=str(template))
    assert any("a file of whole histories needs no --conversation-column" in line
               for line in job.job.describe())  # fmt: skip


def test_a_turn_may_be_called_like_a_field_of_a_request(tmp_path: Path, flat: Any) -> None:
    """Seen red: `n` of a request asks for as many answers, which is refused."""
    source = write_prompts(tmp_path / "in.parquet", ["a", "b"], user=["x", "x"], n=[1, 2])
    job = planned(source, flat, conversation_column="user", turn_column="n")
    assert rows_of(job) == [[0, 1]] and not job.rejected


LOOKS_BACK = (
    "{% set ns = namespace(odd='') %}{% for m in messages %}"
    "{% if 'shout' in m.content %}{% set ns.odd = '!' %}{% endif %}"
    "{{ m.role + ns.odd + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' + ns.odd + ': ' }}{% endif %}"
)


@pytest.mark.fault(
    "conversations",
    injected="a chat template that writes turns by what was asked before, in one conversation",
    outcome="refused before the run: the job's own conversations are rendered whole as well",
)
@pytest.mark.parametrize("shouts", [False, True])
def test_a_template_that_looks_back_is_found_by_the_rows_themselves(
    tmp_path: Path, flat: Any, shouts: bool
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(LOOKS_BACK)
    texts = ["shout" if shouts else "hi", "you", "there", "hello", "alone", "again"]
    source = write(
        tmp_path / "in.parquet", texts, ["a", "a", "a", "b", "c", "b"], [0, 1, 2, 0, 0, 1]
    )
    more = {"apply_chat_template": True, "chat_template": str(template)}
    if not shouts:
        assert not planned(source, flat, **more).rejected
        return
    with pytest.raises(UsageError, match="writes the turns of a conversation otherwise"):
        planned(source, flat, **more)


def test_conversations_that_cannot_be_rendered_whole_prove_nothing(
    tmp_path: Path, flat: Any
) -> None:
    """Of a turn that cannot run those before are looked at; a refusal is its row's alone."""
    template = tmp_path / "chat.jinja"
    template.write_text(LOOKS_BACK + "{% if 'bad' in messages[-1].content %}{{ 1 / 0 }}{% endif %}")
    source = write(tmp_path / "in.parquet", ["a", "bad", "c", None, "d", "e"])
    more = {"apply_chat_template": True, "chat_template": str(template)}
    assert reasons(planned(source, flat, **more)).keys() == {1, 3}


def test_a_conversation_whose_first_turn_is_refused_proves_nothing(
    tmp_path: Path, flat: Any
) -> None:
    """A system message that a template moves about is an error of its conversation alone."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.s = m.content %}{% elif m.role == 'user' %}"
        "{{ '[' + (ns.s if loop.last else '') + m.content + ']' }}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    user = {"role": "user", "content": "hi"}
    messages = [[{"role": "system", "content": "be"}, user], [user], [user], [user]]
    columns = {"conversation_id": ["a", "a", "b", "b"], "turn": [0, 1, 0, 1]}
    pq.write_table(pa.table({"messages": messages, **columns}), tmp_path / "in.parquet")
    job = planned(tmp_path / "in.parquet", flat, chat_template=str(template))
    assert reasons(job) == {0: "TemplateRewritesHistory", 1: "PriorTurnFailed"}
    assert rows_of(job) == [[2, 3]]
