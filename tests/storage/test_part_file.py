"""Parts: whole or absent, and altered ones are noticed."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.storage import durable, part_file
from pipeline.storage.part_file import read_part_footer, write_part
from tests.storage.disk import CODES, FailingDisk
from tests.storage.tables import answers

PROVENANCE = {"run_id": "abc", "plan_hash": "def"}


def test_a_part_says_what_it_holds(tmp_path: Path) -> None:
    path = write_part(tmp_path, 3, answers([9, 3, 4, 5, 0], failed=[4]), PROVENANCE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"part-00003-{digest[:12]}.parquet"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    footer = read_part_footer(path)
    assert footer.row_indices.tolist() == [0, 3, 4, 5, 9]
    assert (footer.number, footer.num_ok, footer.num_error) == (3, 4, 1)
    assert footer.provenance == PROVENANCE
    assert pl.read_parquet(path)["row_index"].to_list() == [9, 3, 4, 5, 0]


def test_pages_carry_checksums(tmp_path: Path) -> None:
    path = write_part(tmp_path, 0, answers(range(50)), PROVENANCE)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    with (
        pytest.raises(OSError, match="CRC"),
        pq.ParquetFile(path, page_checksum_verification=True) as f,
    ):
        f.read()


@pytest.mark.parametrize("position", [10, 200, -200, -10])
def test_an_altered_part_is_named(tmp_path: Path, position: int) -> None:
    path = write_part(tmp_path, 0, answers(range(50)), PROVENANCE)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"{path.name} was altered.*delete it"):
        read_part_footer(path)


def test_a_part_that_vanished_or_is_foreign_is_named(tmp_path: Path) -> None:
    path = write_part(tmp_path, 0, answers([0]), PROVENANCE)
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        read_part_footer(path)
    foreign = tmp_path / "part-00000-0123456789ab.txt"
    with pytest.raises(StorageError, match="not a part"):
        read_part_footer(foreign)
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "x.parquet")
    digest = hashlib.sha256((tmp_path / "x.parquet").read_bytes()).hexdigest()
    disguised = (tmp_path / "x.parquet").rename(tmp_path / f"part-00000-{digest[:12]}.parquet")
    with pytest.raises(StorageError, match="cannot be read"):
        read_part_footer(disguised)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema_version": 99}, "schema version 99, not"),
        ({"rows": [[0, 3]]}, "its footer says 3 rows and it holds 2"),
        ({"num_ok": 9}, "its footer says 2 rows and it holds 2"),
        ({"rows": [[1, 2], [0, 1]], "num_ok": 3}, "its footer says"),
        (None, "it has no column"),
    ],
)
def test_a_part_of_another_make_says_what_is_other(
    tmp_path: Path, change: dict[str, Any] | None, why: str
) -> None:
    """As one of a later version, or of a tool that kept the footer and not the rows."""
    part, key = write_part(tmp_path, 0, answers([0, 1]), PROVENANCE), part_file._METADATA_KEY
    table = pq.read_table(part)
    described = json.loads(pq.read_metadata(part).metadata[key]) | (change or {})
    if change is None:
        table = table.drop_columns(["generated_text"])
    table = table.replace_schema_metadata({key: json.dumps(described)})
    pq.write_table(table, tmp_path / "x.parquet")
    digest = hashlib.sha256((tmp_path / "x.parquet").read_bytes()).hexdigest()
    path = (tmp_path / "x.parquet").rename(tmp_path / f"part-00000-{digest[:12]}.parquet")
    with pytest.raises(StorageError, match=f"cannot be read.*{why}"):
        read_part_footer(path)


def test_a_part_that_reads_back_differently_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.part_file.hash_file", lambda path: "other")
    with pytest.raises(StorageError, match="reads back differently"):
        write_part(tmp_path, 0, answers([0]), PROVENANCE)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_keeps_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: what is no Parquet at all escaped as an error of pyarrow's."""
    real = durable.write_new
    monkeypatch.setattr(
        part_file, "write_new", lambda path, content: real(path, bytes(len(content)))
    )
    with pytest.raises(StorageError, match="reads back differently"):
        write_part(tmp_path, 0, answers([0]), PROVENANCE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", CODES)
def test_every_failing_disk_operation_leaves_old_or_new(tmp_path: Path, code: int) -> None:
    old = write_part(tmp_path, 0, answers([0]), PROVENANCE)
    for fail_at in range(100):
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, fail_at, code)
            try:
                new = write_part(tmp_path, 1, answers([1, 2]), PROVENANCE)
                break
            except StorageError as error:
                assert "part-00001" in str(error) and "run the same command again" in str(error)
                assert isinstance(error.__cause__, OSError) and error.__cause__.errno == code
        left = set(tmp_path.iterdir()) - {old}
        # Only once it is renamed may it be there, and then it is whole.
        assert not left or "replace" in disk.calls[:fail_at]
        for path in left:
            assert read_part_footer(path).row_indices.tolist() == [1, 2]
            path.unlink()
    assert disk.calls == ["open", "write", "fsync", "replace", "open", "fsync"]
    assert read_part_footer(new).row_indices.tolist() == [1, 2]
