"""`coppice recycle`: what a person sees of a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_app import Shell, shell  # noqa: F401  (a fixture)
from tests.kvstore.oracle import as_ids, entry_paths, kv_of, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_store(tmp_path / "kv") as store:
        for prompt in ((1, 2, 3), (1, 2, 3, 4), (5, 6)):
            store.put(as_ids(prompt), 0, kv_of(prompt))
    return tmp_path / "kv"


def test_a_store_is_listed_and_summed_up(shell: Shell, folder: Path) -> None:  # noqa: F811
    assert shell("recycle", "ls", str(folder), "--json") == 0
    entries = json.loads(shell.out)["entries"]
    assert sorted((e["tokens"], e["depth"]) for e in entries) == [(1, 4), (2, 2), (3, 3)]
    assert shell("recycle", "ls", str(folder), "--limit", "1") == 0
    assert "and 2 more" in shell.out and max(map(len, shell.out.splitlines())) <= 80
    assert shell("recycle", "stats", str(folder), "--json") == 0
    found = json.loads(shell.out)
    assert (found["entries"], found["tokens"], found["deepest"]) == (3, 6, 4)
    assert shell("recycle", "stats", str(folder)) == 0
    assert "6, the deepest prefix 4" in shell.out


def test_verify_exits_with_1_and_then_with_0(shell: Shell, folder: Path) -> None:  # noqa: F811
    assert shell("recycle", "verify", str(folder)) == 0
    path = entry_paths(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert shell("recycle", "verify", str(folder)) == 1
    assert "1 entries of" in shell.err and path.stem[:12] in shell.out
    assert shell("recycle", "verify", str(folder)) == 0


def test_gc_keeps_to_the_budget_and_waits_for_no_job(
    shell: Shell,  # noqa: F811
    folder: Path,
) -> None:
    (folder / ".x.1.tmp").touch()
    with open_store(folder):
        assert shell("recycle", "gc", str(folder)) == 2
        assert "wait until it ends" in shell.err
    assert shell("recycle", "gc", str(folder), "--budget", "1500", "--json") == 0
    done = json.loads(shell.out)
    assert done["evicted"] >= 1 and done["bytes"] <= 1500
    assert done["bytes"] == sum(path.stat().st_size for path in entry_paths(folder))
    assert shell("recycle", "gc", str(folder), "--budget", "many") == 2


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "gc"])
def test_what_is_no_store_is_refused(
    shell: Shell,  # noqa: F811
    tmp_path: Path,
    command: str,
) -> None:
    assert shell("recycle", command, str(tmp_path / "missing")) == 2
    (tmp_path / "letter.txt").touch()
    assert shell("recycle", command, str(tmp_path)) == 2
    assert (tmp_path / "letter.txt").exists()
