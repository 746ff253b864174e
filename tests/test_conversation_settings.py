"""What people say about conversations: defaults, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.layers import to_flat
from pipeline.conversation_settings import ConversationSettings
from pipeline.errors import UsageError
from pipeline.model.identity import fingerprint_fields
from pipeline.plan.conversations import Eviction, Evictor
from pipeline.settings import JobSettings
from tests.tiny_job import write_prompts

TURNS = {"conversation_column": "chat"}


def read(**flat: Any) -> JobSettings:
    return JobSettings.from_flat({"model": "m"} | flat)


def fingerprint(**flat: Any) -> dict[str, Any]:
    return fingerprint_fields(read(**flat), {"model": "m"}, {"input": "i", "tokenizer": "t"})


def test_evictors_and_defaults_are_those_of_the_plan() -> None:
    settings, plan = ConversationSettings(), Eviction()
    field = ConversationSettings.model_fields["evict"]
    assert get_args(field.annotation) == get_args(Evictor)
    assert (settings.num_sink_tokens, settings.num_gist_tokens) == (
        plan.sink_tokens,
        plan.gist_tokens,
    )
    assert (settings.evict, settings.evict_to, settings.evict_unit) == (
        plan.evictor,
        plan.evict_to,
        plan.unit,
    )
    assert (settings.positions, settings.on_full) == (plan.positions, plan.on_full)


def test_either_column_asks_for_conversations() -> None:
    assert not read().conversations.has_turns
    assert read(turn_column="t").conversations.has_turns and read(**TURNS).conversations.has_turns


def test_settings_come_back_from_their_record() -> None:
    """Also those of a run that knew nothing of conversations."""
    for flat in ({}, TURNS, {**TURNS, "evict": "gist", "gist_tokens": 9, "max_degenerate": "2%"}):
        settings = read(**flat)
        assert JobSettings.model_validate(settings.model_dump(mode="json")) == settings
        assert JobSettings.from_flat(to_flat(settings)) == settings
    before = read().model_dump(mode="json")
    del before["conversations"]
    assert JobSettings.model_validate(before) == read()


def test_the_fingerprint_has_what_changes_answers_and_no_more() -> None:
    evicting = {**TURNS, "evict": "sink-recent"}
    assert fingerprint() == fingerprint(fail_on_error="3%")
    assert "evict" not in fingerprint(**TURNS) and fingerprint(**TURNS) != fingerprint()
    assert fingerprint(**TURNS) == fingerprint(**TURNS, max_degenerate="2%")
    assert fingerprint(**evicting) == fingerprint(**evicting, sink_tokens=4)
    others: list[dict[str, Any]] = [
        {"evict": "oldest"}, {"budget_tokens": 99}, {"evict_to": 0.5}, {"sink_tokens": 3},
        {"evict_unit": "turn"}, {"positions": "gap"}, {"on_full": "error"}, {"turn_column": "t"},
    ]  # fmt: skip
    found = [str(fingerprint(**evicting | other)) for other in others]
    assert len({str(fingerprint(**evicting)), *found}) == len(others) + 1


@pytest.mark.fault(
    "conversations",
    injected="settings that contradict one another: eviction without conversations, tokens of "
    "another evictor, strict, another engine, documents, prompts that are cut",
    outcome="refused by name before anything is loaded, exit code 2",
)
@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"evict": "gist"}, "--evict is for conversations; name their --conversation-column"),
        ({"max_degenerate": "2%"}, "--max-degenerate is for conversations"),
        ({**TURNS, "budget_tokens": 9}, "--budget-tokens says nothing with --evict none"),
        ({**TURNS, "positions": "gap"}, "--positions says nothing with --evict none"),
        ({**TURNS, "on_full": "error"}, "--on-full says nothing with --evict none"),
        ({**TURNS, "evict": "gist", "sink_tokens": 4}, "--sink-tokens is for --evict sink-recent"),
        (
            {**TURNS, "evict": "h2o", "gist_tokens": 4},
            "--gist-tokens is for --evict gist or gist-r",
        ),
        ({**TURNS, "evict": "h2o", "evict_unit": "turn"}, "which --evict h2o does not"),
        ({**TURNS, "evict": "gist", "evict_to": 1}, "--evict-to must lie between 0 and 1"),
        ({**TURNS, "evict": "gist", "evict_to": 0}, "--evict-to must lie between 0 and 1"),
        ({**TURNS, "evict": "gist", "budget_tokens": 0}, "budget-tokens: must be at least 1"),
        ({**TURNS, "evict": "stale"}, "evict: must be"),
        ({**TURNS, "evict": "gist", "positions": "stale"}, "positions: must be"),
        ({**TURNS, "evict": "gist", "fidelity": "strict"}, "--evict gist does not work with --fid"),
        ({**TURNS, "evict": "gist", "engine": "naive"}, "does not work with --engine naive"),
        ({**TURNS, "evict": "gist", "engine": "vllm"}, "does not work with --engine vllm"),
        ({**TURNS, "evict": "gist", "engine": "echo"}, "does not work with --engine echo"),
        ({**TURNS, "reuse": "epic"}, "--conversation-column does not work with --reuse epic"),
        ({"turn_column": "t", "reuse": "epic"}, "--turn-column does not work with --reuse epic"),
        ({**TURNS, "document_order": "best"}, "does not work with --document-order best"),
        ({**TURNS, "segments_column": "s"}, "does not work with --segments-column"),
        ({**TURNS, "documents_column": "d"}, "does not work with --documents-column"),
        ({**TURNS, "reorder_fields": True}, "does not work with --reorder-fields"),
        ({**TURNS, "on_overlong": "keep"}, "does not work with --on-overlong keep"),
        ({**TURNS, "on_overlong": "truncate-left"}, "does not work with --on-overlong truncate"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(flat: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(**flat)
    message = str(refused.value)
    assert says in message and "\n" not in message and not message.endswith(".")


@pytest.mark.parametrize(
    "flat",
    [
        {"fidelity": "strict"}, {"engine": "naive"}, {"engine": "vllm"}, {"template": "t.j2"},
        {"num_shards": 2, "shard": 0}, {"executor": "ray"}, {"preserve_order": True},
        {"kv_store": "s"}, {"messages_column": "m"}, {"max_degenerate": "2%"},
        {"evict": "sink-recent", "evict_unit": "turn", "num_shards": 2, "shard": 1},
    ],
)  # fmt: skip
def test_what_works_with_conversations_is_not_refused(flat: dict[str, Any]) -> None:
    assert read(**TURNS, **flat).conversations.has_turns


@pytest.mark.parametrize("command", ["run", "plan", "validate"])
def test_the_commands_know_the_flags(tmp_path: Path, tokenizer_folder: Path, command: str) -> None:
    prompts = write_prompts(tmp_path / "in.parquet", ["p"], conversation_id=["a"], turn=[0])
    output = ["-o", str(tmp_path / "out")] if command != "validate" else []
    call = [command, str(prompts), "--model", str(tokenizer_folder), "--engine", "echo", *output]
    found = CliRunner().invoke(app, [*call, "--evict", "gist"])
    assert isinstance(found.exception, UsageError) and "--evict is for" in str(found.exception)
