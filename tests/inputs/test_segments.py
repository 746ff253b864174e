"""Prompts in segments: which columns say them, and what is wrong with a row's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, UsageError
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.prompts import SegmentedPrompt

SYSTEM, ONE, TWO, QUERY = (
    {"role": role, "text": text}
    for role, text in (("system", "be kind. "), ("document", "one "), ("document", "two "),
                       ("query", "why?"))
)  # fmt: skip
ROW = [SYSTEM, ONE, TWO, QUERY]
READ = SegmentedPrompt("be kind. ", ("one ", "two "), "why?")


def opened(tmp_path: Path, wants: bool = False, _read: Any = None, **columns: Any) -> PromptSource:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    settings = ReadSettings(**(_read or {}))
    return open_source(Location(tmp_path / "in.parquet"), settings, None, wants)


def faults(source: PromptSource) -> list[tuple[str, str]]:
    (batch,) = source.iter_prompts()
    assert all(batch.contents[bad.row_index] is None for bad in batch.rejected)
    return [(bad.error_type, bad.message) for bad in batch.rejected]


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("write", [lambda row: row, json.dumps])
def test_segments_are_structs_or_json(tmp_path: Path, write: Any, wants: bool) -> None:
    further = [part | {"id": "x"} for part in ROW]
    (batch,) = opened(tmp_path, wants, segments=[write(ROW), write(further)]).iter_prompts()
    assert batch.contents == [READ, READ] and not batch.rejected


def test_json_lines_are_read_alike(tmp_path: Path) -> None:
    lines = [{"id": "a", "segments": ROW}, {"id": "b", "segments": [QUERY]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    copies = ParquetCopies(tmp_path / "cache")
    (batch,) = open_source(Location(tmp_path / "in.jsonl"), ReadSettings(), copies).iter_prompts()
    assert batch.contents == [READ, SegmentedPrompt("", (), "why?")]


def test_documents_stand_before_the_prompt_where_somebody_asks_for_them(tmp_path: Path) -> None:
    """Without that, the prompts are those of the same file before there were documents."""
    columns: dict[str, Any] = {"prompt": ["why?", "so?"], "documents": [["one ", "two "], []]}
    plain = opened(tmp_path, **columns)
    (batch,) = plain.iter_prompts()
    assert batch.contents == ["why?", "so?"] and not plain.columns.has_segments
    assert plain.columns.describe() == [
        "no part of the prompt unless --reuse asks for documents: the columns documents"
    ]
    for wants, read in (
        (True, {}),
        (False, {"documents_column": "documents"}),
        (True, {"prompt_column": "prompt"}),
    ):
        (batch,) = opened(tmp_path, wants, read, **columns).iter_prompts()
        assert batch.contents == [
            SegmentedPrompt("", ("one ", "two "), "why?"), SegmentedPrompt("", (), "so?"),
        ]  # fmt: skip


def test_segments_win_over_a_prompt_only_where_they_are_needed(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"prompt": ["p"], "segments": [ROW]}
    (plain,) = opened(tmp_path, **columns).iter_prompts()
    (asked,) = opened(tmp_path, True, **columns).iter_prompts()
    (named,) = opened(tmp_path, False, {"segments_column": "segments"}, **columns).iter_prompts()
    assert plain.contents == ["p"] and asked.contents == named.contents == [READ]


@pytest.mark.fault(
    "prompts in segments",
    injected="segments that are null, empty, no list, without role, text or query, of a role that "
    "is not known, out of order; a document that is empty",
    outcome="error of that row, in one sentence that names the segment and quotes nothing",
)
@pytest.mark.parametrize(
    ("segments", "error_type", "says"),
    [
        (None, "NullPrompt", "null"),
        ([], "BadSegments", "no query"),
        ([SYSTEM, ONE], "BadSegments", "no query"),
        ([ONE, QUERY | {"text": ""}], "BadSegments", "no query"),
        ([{"text": "canary"}, QUERY], "BadSegments", "segment 0 has no role"),
        ([{"role": "user", "text": "canary"}], "BadSegments", "segment 0 has a role that is not"),
        ([ONE, {"role": "document"}, QUERY], "BadSegments", "segment 1 has no text"),
        ([ONE, SYSTEM, QUERY], "BadSegments", "segment 1 is of the role system"),
        ([QUERY, ONE], "BadSegments", "behind a query"),
        ([ONE, {"role": "document", "text": ""}, QUERY], "BadSegments", "document 1 is empty"),
    ],
)
def test_a_row_whose_segments_cannot_be_used_says_why(
    tmp_path: Path, segments: Any, error_type: str, says: str
) -> None:
    kind = pa.list_(pa.struct({"role": pa.string(), "text": pa.string()}))
    source = opened(tmp_path, segments=pa.array([ROW, segments, ROW], kind))
    ((found, message),) = faults(source)
    assert found == error_type and says in message and "canary" not in message
    if segments is not None:
        (same,) = faults(opened(tmp_path, segments=[json.dumps(s) for s in (ROW, segments)]))
        assert same == (found, message)


@pytest.mark.fault(
    "prompts in segments",
    injected="documents null, with a null or an empty text; JSON of half a surrogate pair",
    outcome="error of that row; an empty list is a row without documents",
)
def test_a_row_whose_documents_cannot_be_used_says_why(tmp_path: Path) -> None:
    lists = [None, ["a", None], ["a", ""], ["a"], []]
    found = faults(opened(tmp_path, True, prompt=["q"] * 5, documents=lists))
    assert [kind for kind, _ in found] == ["BadSegments"] * 3
    assert [m.split(";")[0] for _, m in found] == [
        "documents is null", "document 1 is null", "document 1 is empty",
    ]  # fmt: skip
    half = '[{"role": "query", "text": "\\ud800"}]'
    ((_, message),) = faults(opened(tmp_path, segments=[half]))
    assert "half a surrogate pair" in message


@pytest.mark.fault(
    "prompts in segments",
    injected="--reuse or --document-order on a file without segments or documents; columns of "
    "another type; columns that exclude each other",
    outcome="refused before a row is read, exit code 2, naming the columns and the flags",
)
def test_a_file_without_segments_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "hi"}]]
    for columns in ({"prompt": ["p"]}, {"messages": messages}, {"documents": [["d"]]}):
        with pytest.raises(InputError, match="--segments-column, or with --documents-column"):
            opened(tmp_path, True, **columns)
    for wrong in ([1], [["text"]], [[{"role": "query"}]]):
        with pytest.raises(InputError, match="not list of structs with the strings role and text"):
            opened(tmp_path, True, segments=wrong)
    with pytest.raises(InputError, match="not list of strings"):
        opened(tmp_path, True, prompt=["p"], documents=["d"])
    both = {"prompt": ["p"], "documents": [["d"]], "segments": [ROW], "messages": messages}
    for names in (("segments", "prompt"), ("segments", "documents"), ("messages", "documents")):
        read = {f"{name}_column": name for name in names}
        with pytest.raises(InputError, match="exclude each other"):
            opened(tmp_path, True, read, **both)
    (tmp_path / "t.j2").write_text("{{ prompt }}")
    with pytest.raises(UsageError, match="drop --segments-column"):
        with_template = {"template": tmp_path / "t.j2", "segments_column": "segments"}
        opened(tmp_path, False, with_template, **both)


def test_an_input_column_named_like_one_of_ours_is_carried_beside_it(tmp_path: Path) -> None:
    """Of `documents` the output has the number."""
    source = opened(tmp_path, True, prompt=["p"], documents=[["d"]], input_exact=[1])
    assert source.columns.names == ("prompt", "documents")
    with pytest.raises(InputError, match="'documents' and 'input_documents' would both"):
        opened(tmp_path, True, prompt=["p"], documents=[["d"]], input_documents=[1])
    opened(tmp_path, prompt=["p"], documents=[["d"]], input_documents=[1])
