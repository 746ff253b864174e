"""What people say about documents: defaults by mode, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.layers import to_flat
from pipeline.errors import UsageError
from pipeline.reuse_settings import ReuseSettings
from pipeline.settings import JobSettings
from tests.tiny_job import write_prompts


def read(**flat: Any) -> JobSettings:
    return JobSettings.from_flat({"model": "m"} | flat)


def test_each_mode_has_its_defaults() -> None:
    prefix, epic = ReuseSettings(), ReuseSettings(reuse="epic")
    assert not prefix.moves_documents and not prefix.asks_for_documents
    assert ReuseSettings(document_order="best").asks_for_documents and epic.asks_for_documents
    assert (prefix.num_epic_tokens, epic.num_epic_tokens) == (0, 8)
    assert ReuseSettings(reuse="epic", epic_tokens=2).num_epic_tokens == 2
    blend = ReuseSettings.model_validate({"reuse": "cacheblend", "blend_share": "30%"})
    assert blend.share_to_blend == 0.3 and epic.share_to_blend == 0.0
    assert ReuseSettings(reuse="cacheblend").share_to_blend == 0.15
    packet = ReuseSettings(reuse="packet", adapter=Path("a"))
    assert (epic.context, blend.context, packet.context) == ("preamble", "preamble", "alone")
    assert ReuseSettings(reuse="epic", document_context="alone").context == "alone"


def test_settings_come_back_from_their_record() -> None:
    """Of each mode, and those of a run that knew nothing of documents."""
    for flat in ({}, {"reuse": "epic"}, {"reuse": "packet", "adapter": "a"}):
        settings = read(**flat)
        assert JobSettings.model_validate(settings.model_dump(mode="json")) == settings
        assert JobSettings.from_flat(to_flat(settings)) == settings
    before = read().model_dump(mode="json")
    del before["reuse"], before["read"]["segments_column"], before["read"]["documents_column"]
    assert JobSettings.model_validate(before) == read()


@pytest.mark.fault(
    "prompts in segments",
    injected="settings that contradict one another: tokens of another mode, no adapter, strict, "
    "another engine, Ray, shards, templates, conversations",
    outcome="refused by name before anything is loaded, exit code 2",
)
@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"epic_tokens": 4}, "epic-tokens is for --reuse epic, and not for prefix"),
        ({"reuse": "concat", "epic_tokens": 4}, "epic-tokens is for --reuse epic"),
        ({"reuse": "epic", "epic_tokens": 0}, "epic-tokens: must be at least 1"),
        ({"reuse": "epic", "blend_share": "10%"}, "blend-share is for --reuse cacheblend"),
        ({"reuse": "cacheblend", "blend_share": 2}, "blend-share: 2 is not a share"),
        ({"reuse": "epic", "adapter": "a"}, "adapter is for --reuse kvlink or packet"),
        ({"reuse": "kvlink"}, "--reuse kvlink needs an --adapter"),
        ({"document_context": "alone"}, "document-context says nothing with --reuse prefix"),
        ({"reuse": "copies"}, "reuse: must be"),
        ({"reuse": "epic", "fidelity": "strict"}, "--reuse epic does not work with --fidelity"),
        ({"reuse": "epic", "engine": "naive"}, "does not work with --engine naive"),
        ({"reuse": "epic", "engine": "vllm"}, "does not work with --engine vllm"),
        ({"reuse": "epic", "engine": "echo"}, "does not work with --engine echo"),
        ({"reuse": "epic", "executor": "ray"}, "does not work with --executor ray"),
        ({"reuse": "epic", "num_shards": 2, "shard": 0}, "does not work with --num-shards"),
        ({"reuse": "epic", "template": "t.j2"}, "does not work with --template"),
        ({"reuse": "epic", "reorder_fields": True}, "does not work with --reorder-fields"),
        ({"reuse": "epic", "messages_column": "m"}, "does not work with --messages-column"),
        ({"document_order": "best", "reorder_fields": True}, "exclude each other"),
        ({"min_agreement": 3}, "min-agreement: 3 is not a share"),
        ({"max_kl": -1}, "max-kl: must be at least 0"),
        ({"max_kl": float("inf")}, "max-kl: must be a number (got inf)"),
        ({"calibration_rows": -1}, "calibration-rows: must be at least 0"),
        ({"on_disagreement": "ask"}, "on-disagreement: must be"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(flat: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(**flat)
    message = str(refused.value)
    assert says in message and "\n" not in message and not message.endswith(".")


@pytest.mark.parametrize("command", ["run", "plan", "validate"])
def test_the_commands_know_the_flags(tmp_path: Path, tokenizer_folder: Path, command: str) -> None:
    prompts = write_prompts(tmp_path / "in.parquet", ["p"], documents=[["d"]])
    output = ["-o", str(tmp_path / "out")] if command != "validate" else []
    call = [command, str(prompts), "--model", str(tokenizer_folder), *output]
    found = CliRunner().invoke(app, [*call, "--reuse", "concat", "--engine", "echo"])
    assert isinstance(found.exception, UsageError) and "--engine echo" in str(found.exception)
    found = CliRunner().invoke(app, [*call, "--engine", "echo", "--documents-column", "documents"])
    assert found.exit_code == 0, found.exception
