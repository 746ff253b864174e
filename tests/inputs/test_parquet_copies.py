"""JSON lines read like Parquet: through a copy that is made once, and never seen by the user."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, StorageError
from pipeline.inputs import json_lines, line_reader, parquet_copies, text_files
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.location import Location
from pipeline.private_folder import private_folder
from pipeline.prompt_settings import ReadSettings
from tests.storage.disk import FailingDisk

ROWS = [{"prompt": f"p{i}", "score": i} for i in range(7)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies have row groups of three rows."""
    monkeypatch.setattr(line_reader, "_ROWS_AT_A_TIME", 3)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "inputs"


def write(path: Path, rows: Sequence[object] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path | str, cache: Path) -> PromptSource:
    return open_source(Location(path), ReadSettings(), copies=ParquetCopies(cache))


def prompts(opened: PromptSource) -> list[Any]:
    return [content for batch in opened.iter_prompts() for content in batch.contents]


def copies(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are converted from now on."""
    converted: list[str] = []

    def write_rows(source: Any, *rest: Any, **how: Any) -> int:
        converted.append(source.base_name)
        return text_files.write_rows(source, *rest, **how)

    monkeypatch.setattr(parquet_copies, "write_rows", write_rows)
    return converted


def test_rows_ids_and_fingerprint_are_those_of_the_original(tmp_path: Path, cache: Path) -> None:
    """Seen red: ids counted by row groups of the copy, the hash of the copy."""
    lines = write(tmp_path / "in.jsonl")
    opened = source(lines, cache)
    (copy,) = copies(cache)
    assert pq.read_metadata(copy).num_row_groups == 3
    assert opened.num_rows == 7 and prompts(opened) == [row["prompt"] for row in ROWS]
    ids = [name for batch in opened.iter_prompts() for name in batch.ids]
    assert ids == [f"in.jsonl:0:{row}" for row in range(7)]
    assert opened.take(np.array([6, 2])).to_pylist() == [ROWS[6], ROWS[2]]
    digest = hashlib.sha256(b"rows=7\n" + hashlib.sha256(lines.read_bytes()).digest())
    assert opened.fingerprint() == digest.hexdigest()


def test_only_the_owner_may_read_a_copy(tmp_path: Path, cache: Path) -> None:
    source(write(tmp_path / "in.jsonl"), cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert copies(cache)[0].stat().st_mode & 0o777 == 0o600


def test_a_copy_is_made_once_and_again_when_the_original_changed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = count_conversions(monkeypatch)
    lines = write(tmp_path / "in.jsonl")
    for _ in range(2):
        assert source(lines, cache).num_rows == 7
    assert converted == ["in.jsonl"]
    opened = source(lines, cache)
    write(lines, ROWS[:3])
    assert prompts(source(lines, cache)) == ["p0", "p1", "p2"]
    assert len(converted) == 2 and len(copies(cache)) == 1
    with pytest.raises(InputError, match=r"in\.jsonl changed while"):
        prompts(opened)


def test_copies_that_nobody_uses_are_removed(tmp_path: Path, cache: Path) -> None:
    """Also when only Parquet files are read; and what a killed process left half."""
    old = write(tmp_path / "old.jsonl")
    source(old, cache)
    (cache / ".x.parquet.99.tmp").write_bytes(b"half")
    long_ago = time.time() - 4 * 24 * 3600
    for path in copies(cache):
        os.utime(path, (long_ago, long_ago))
    opened = source(write(tmp_path / "new.jsonl"), cache)
    assert len(copies(cache)) == 1
    for path in copies(cache):
        os.utime(path, (long_ago, long_ago))
    prompts(opened)  # used, so it stays
    pq.write_table(pa.table({"prompt": ["p"]}), tmp_path / "a.parquet")
    source(tmp_path / "a.parquet", cache)
    assert len(copies(cache)) == 1


def test_a_damaged_copy_is_made_again(tmp_path: Path, cache: Path) -> None:
    """Half a file at once; a flipped byte when it is met, by the same command again."""
    lines = write(tmp_path / "in.jsonl")
    source(lines, cache)
    (copy,) = copies(cache)
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    assert len(prompts(source(lines, cache))) == 7
    column = pq.read_metadata(copy).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    broken = bytearray(whole)
    broken[start + column.total_compressed_size - 2] ^= 1
    copy.write_bytes(broken)
    with pytest.raises(InputError, match=r"the copy of .*in\.jsonl is damaged"):
        prompts(source(lines, cache))
    assert len(prompts(source(lines, cache))) == 7


def test_a_copy_of_other_bytes_with_the_same_stamp_never_runs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file can be replaced under its old size and time; its hash tells."""
    lines = write(tmp_path / "in.jsonl")
    source(lines, cache)
    before = lines.stat()
    lines.write_bytes(lines.read_bytes().replace(b"p0", b"q0"))
    os.utime(lines, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prompts(source(lines, cache))[0] == "q0"
    with monkeypatch.context() as patch:  # a file system that keeps no time of the last change
        patch.setattr(InputFile, "stamp", lambda file: file.path)
        assert prompts(source(lines, cache))[0] == "q0"
        lines.write_bytes(lines.read_bytes().replace(b"q0", b"r0"))
        with pytest.raises(InputError, match=r"in\.jsonl changed"):
            source(lines, cache).fingerprint()
        opened = source(lines, cache)
        assert opened.fingerprint() and prompts(opened)[0] == "r0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 8 of .*in.jsonl is not a JSON object"),
        ('{"prompt": "a", "score": "b"}', "field 'score' of line 8 of .*in.jsonl"),
        ('{"prompt": ["a"]}', "field 'prompt' of line 8 of .*in.jsonl"),
    ],
)
def test_a_line_that_is_no_row_is_named_and_no_copy_is_left(
    tmp_path: Path, cache: Path, line: str, said: str
) -> None:
    lines = write(tmp_path / "in.jsonl")
    lines.write_text(lines.read_text() + line + "\n")
    with pytest.raises(InputError, match=said):
        source(lines, cache)
    assert copies(cache) == []


def test_a_late_line_widens_the_type(tmp_path: Path, cache: Path) -> None:
    """The first two batches know neither the field nor that the numbers are not whole."""
    rows = [*ROWS, {"prompt": "x", "score": 0.5, "tags": [{"k": 1}]}, {"prompt": None}]
    opened = source(write(tmp_path / "in.jsonl", rows), cache)
    taken = opened.take(np.array([0, 7, 8])).to_pylist()
    assert taken[0] == {"prompt": "p0", "score": 0.0, "tags": None}
    assert taken[1:] == [rows[7], {"prompt": None, "score": None, "tags": None}]
    (bad,) = [bad for batch in opened.iter_prompts() for bad in batch.rejected]
    assert (bad.row_index, bad.error_type) == (8, "NullPrompt")


def test_whole_numbers_that_a_float_cannot_hold_are_named(tmp_path: Path, cache: Path) -> None:
    rows = [*ROWS, {"prompt": "x", "score": 0.5}]
    rows[1] = {"prompt": "y", "score": 2**53 + 1}
    with pytest.raises(InputError, match="field 'score' of line 2 of"):
        source(write(tmp_path / "in.jsonl", rows), cache)


def test_a_folder_may_hold_both_kinds(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "both"
    write(folder / "b.jsonl", [{"prompt": "2", "n": 1}])
    pq.write_table(pa.table({"n": [0, 0], "prompt": ["0", "1"]}), folder / "a.parquet")
    opened = source(folder, cache)
    assert prompts(opened) == ["0", "1", "2"] == prompts(source(f"{folder}/*", cache))
    assert opened.take(np.array([2, 0])).to_pylist() == [
        {"n": 1, "prompt": "2"},
        {"n": 0, "prompt": "0"},
    ]
    write(folder / "b.jsonl", [{"prompt": "2", "n": "1"}])
    with pytest.raises(InputError, match=r"'n' is int64 in .*a\.parquet but .* in .*b\.jsonl"):
        source(folder, cache)


def test_gzip_is_read_whole_or_refused(tmp_path: Path, cache: Path) -> None:
    plain = write(tmp_path / "in.jsonl").read_bytes()
    path = tmp_path / "sub" / "in.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(plain[:50]) + gzip.compress(plain[50:]))
    opened = source(tmp_path / "sub", cache)
    assert prompts(opened) == [row["prompt"] for row in ROWS]
    assert next(opened.iter_prompts()).ids[0] == "in.jsonl.gz:0:0"
    path.write_bytes(gzip.compress(plain)[:-12])
    with pytest.raises(InputError, match=r"in\.jsonl\.gz is damaged"):
        source(path, cache)


def test_an_endless_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_reader, "_LONGEST_LINE", 1000)
    lines = write(tmp_path / "in.jsonl", [*ROWS, {"prompt": "x" * 2000}])
    with pytest.raises(InputError, match="line 8 of .* is longer"):
        source(lines, cache)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lines_that_change_while_they_are_converted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Replaced, cut or deleted between the first look at the types and the second at the rows."""
    lines = write(tmp_path / "in.jsonl")
    acts = [
        lambda: write(lines, [{"prompt": "other", "more": 1}]),
        lambda: os.truncate(lines, 40),
        lines.unlink,
    ]
    whole = json_lines._plain

    def plain(source: Any, *rest: Any) -> Any:
        found = whole(source, *rest)
        acts[number]()
        return found

    monkeypatch.setattr(json_lines, "_plain", plain)
    with pytest.raises(InputError, match=r"in\.jsonl"):
        source(lines, cache)
    assert copies(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="in.jsonl in .*file/inputs .*XDG_CACHE_HOME"):
        source(write(tmp_path / "in.jsonl"), tmp_path / "file" / "inputs")


@pytest.mark.parametrize("fail_at", range(4))
def test_a_disk_that_fails_leaves_no_half_copy(tmp_path: Path, cache: Path, fail_at: int) -> None:
    lines = write(tmp_path / "in.jsonl")
    private_folder(cache)
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, fail_at, 28)
        with pytest.raises(StorageError, match="No space left"):
            source(lines, cache)
    assert disk.calls[-1] == ["open", "fsync", "replace", "open"][fail_at]
    assert all(pq.read_metadata(path).num_rows == 7 for path in copies(cache))
    assert len(prompts(source(lines, cache))) == 7
