"""Whatever happens to the folder of a store is a miss: said, counted, and never a wrong answer."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.kvstore import entry, upkeep
from pipeline.kvstore.header import BadEntry, Head
from pipeline.kvstore.store import KVStore
from tests.kvstore.oracle import (
    BUDGET,
    IDENTITY,
    as_ids,
    check_prompt,
    entry_paths,
    kv_of,
    open_store,
)

TOP, BELOW, OTHER = (1, 2, 3, 4), (1, 2, 3, 9, 9), (7, 7, 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of two entries that hang together and one alone."""
    with open_store(tmp_path / "kv") as store:
        for prompt in (TOP, BELOW, OTHER):
            assert store.put(as_ids(prompt), 0, kv_of(prompt))
    return tmp_path / "kv"


def path_of(folder: Path, prompt: tuple[int, ...]) -> Path:
    """The file of the last entry of a prompt."""
    with KVStore.open(folder, IDENTITY, BUDGET) as store:
        key = store._walk(as_ids(prompt), "").nodes[-1].key
    return next(path for path in entry_paths(folder) if path.stem == key)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def other_shape(path: Path) -> None:
    """The file of a store for a model of another layout, under the name of ours."""
    wide = Head("0" * 64, "0" * 64, 0, 4, "float32", (2, 2, 6), "0" * 32)
    path.unlink()
    entry.write_entry(path, wide, as_ids(TOP), torch.zeros(wide.kv_bytes, dtype=torch.uint8))


def linked(path: Path) -> None:
    """To a good file: whoever can make links could lead us anywhere."""
    moved = path.parents[2] / "moved"
    path.rename(moved)
    path.symlink_to(moved)


def rewritten(path: Path) -> None:
    """The same tensors by another program."""
    tensors = load_file(path)
    save_file(tensors, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "truncated in the head": lambda path: os.truncate(path, 20),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit of the KV": lambda path: flip(path, path.stat().st_size - 50),
    "the last byte": lambda path: flip(path, -1),
    "a bit of the ids": lambda path: flip(path, path.read_bytes().rindex(bytes(as_ids(TOP)))),
    "a bit of the header": lambda path: flip(path, 60),
    "an absurd header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "another shape": other_shape,
    "another program's": rewritten,
    "a folder": replaced(lambda path: path.mkdir()),
    "a link": linked,
    "a pipe": replaced(os.mkfifo),
}


@pytest.mark.fault(
    "committed part altered",
    injected="entries of a KV store truncated, longer, empty, flipped, of another shape, replaced "
    "by a folder, a link, a pipe",
    outcome="a miss, said once and counted; the file lies in the quarantine; what hung on it is "
    "gone and the rest still there",
)
@pytest.mark.parametrize("opened", ["before", "after", "reader"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_miss_and_put_aside(
    folder: Path, damage: str, opened: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen red: without the checksum (a bit of the KV, the last byte), with blocking open (a pipe),
    with links followed."""
    path = path_of(folder, TOP)
    if opened == "after":
        DAMAGES[damage](path)
    writer = open_store(folder)
    store = open_store(folder) if opened == "reader" else writer
    if opened != "after":
        DAMAGES[damage](path)
    caplog.clear()
    for _ in range(2):
        assert store.load(as_ids(BELOW), 0, 5) is None
        check_prompt(store, TOP, 0)
    check_prompt(store, OTHER, 3)
    assert store.stats.quarantined == 1
    assert len(list((folder / "quarantine").iterdir())) == 1 and not path.exists()
    assert len(caplog.records) == 1
    if opened != "reader":
        assert store.put(as_ids(TOP), 0, kv_of(TOP))
        check_prompt(store, TOP, 4)
    store.close()
    writer.close()
    with open_store(folder) as store:
        check_prompt(store, BELOW, 0 if opened == "reader" else 3)
        check_prompt(store, OTHER, 3)


def test_what_was_put_aside_counts_for_the_budget_and_goes_first(folder: Path) -> None:
    flip(path_of(folder, OTHER), -1)
    with open_store(folder) as store:
        assert store.load(as_ids(OTHER), 0, 3) is None
        used = store._catalogue.used_bytes
    assert used == sum(path.stat().st_size for path in folder.rglob("*-*")) + sum(
        path.stat().st_size for path in entry_paths(folder)
    )
    with open_store(folder, budget=used) as store:
        assert store.put(as_ids(OTHER), 0, kv_of(OTHER))
        assert not list((folder / "quarantine").iterdir())
        check_prompt(store, BELOW, 5)


def test_a_bad_read_of_the_disk_is_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not SIGBUS: pages are brought in by a call that can say no."""
    store = open_store(folder)

    def fail(mapped: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(entry, "_populate", fail)
    assert store.load(as_ids(TOP), 0, 4) is None
    assert store.stats.quarantined == 1
    store.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE])
def test_what_may_not_be_opened_is_a_miss(
    folder: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process out of file descriptors puts nothing aside. Seen red: every OSError did."""
    store = open_store(folder)
    real = os.open

    def fail(path: object, *rest: int) -> int:
        if str(path).endswith(".safetensors"):
            raise OSError(code, os.strerror(code))
        return real(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.kvstore.entry.os.open", fail)
        for _ in range(3):
            assert store.load(as_ids(OTHER), 0, 3) is None
    assert len(caplog.records) == 1
    check_prompt(store, OTHER, 3 if code == errno.EMFILE else 0)
    assert store.stats.quarantined == (code != errno.EMFILE)
    store.close()


@pytest.mark.fault(
    "disk full or EIO",
    injected="a KV store's disk that is full from the start of a put on",
    outcome="nothing new is kept, which is said once; lookups and loads go on",
)
def test_a_full_disk_keeps_nothing_and_the_job_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(folder)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert not store.put(as_ids((8, 8)), 0, kv_of((8, 8)))
        assert not store.put(as_ids((8, 9)), 0, kv_of((8, 9)))
        check_prompt(store, BELOW, 5)
    assert [r.getMessage() for r in caplog.records] == [
        "the KV store keeps nothing new: No space left on device"
    ]
    assert not list(folder.rglob("*.tmp"))
    assert store.put(as_ids((8, 8)), 0, kv_of((8, 8)))
    store.close()


@pytest.mark.fault(
    "committed part altered",
    injected="the folder of a KV store deleted while a job uses it",
    outcome="misses; nothing is made anew behind the lock; the job goes on",
)
def test_a_store_deleted_while_it_is_used_is_a_miss(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(folder) as store:
        shutil.rmtree(folder)
        assert store.match(as_ids(TOP)) == 4
        assert store.load(as_ids(TOP), 0, 4) is None
        assert store.match(as_ids(TOP)) == 0
        assert not store.put(as_ids(TOP), 0, kv_of(TOP))
        store.refresh()
        assert store.match(as_ids(OTHER)) == 0
    assert not folder.exists()
    (said,) = [r.getMessage() for r in caplog.records]
    assert "was deleted" in said


@pytest.mark.fault(
    "committed part altered",
    injected="the index of a KV store missing, cut, flipped, of another folder",
    outcome="it is made again from the entries",
)
@pytest.mark.parametrize("case", ["missing", "cut", "flipped", "empty", "a folder", "another's"])
def test_index_and_entries_that_disagree(folder: Path, case: str) -> None:
    """Seen red: rows of the index believed although their files are gone."""
    index = folder / "index.safetensors"
    content = index.read_bytes()
    index.unlink()
    if case == "cut":
        index.write_bytes(content[:-7])
    elif case == "flipped":
        index.write_bytes(content)
        flip(index, -3)
    elif case == "empty":
        index.touch()
    elif case == "a folder":
        index.mkdir()
    elif case == "another's":
        with open_store(folder.with_name("another")) as store:
            store.put(as_ids(OTHER), 0, kv_of(OTHER))
            store.put(as_ids((4, 4)), 0, kv_of((4, 4)))
        shutil.copy(folder.with_name("another") / index.name, index)
    with open_store(folder) as store:
        check_prompt(store, BELOW, 5)
        check_prompt(store, OTHER, 3)
        check_prompt(store, (4, 4), 0)
        assert store.stats.quarantined == 0
    assert case == "a folder" or index.stat().st_size == len(content)


def test_entries_that_come_and_go_behind_the_index(folder: Path) -> None:
    """A removed entry takes what hung on it; a copied one is found."""
    gone = path_of(folder, TOP)
    with open_store(folder.with_name("another")) as store:
        store.put(as_ids((4, 4)), 0, kv_of((4, 4)))
    gone.unlink()
    shutil.copytree(folder.with_name("another"), folder, dirs_exist_ok=True)
    with open_store(folder) as store:
        check_prompt(store, BELOW, 0)
        check_prompt(store, OTHER, 3)
        check_prompt(store, (4, 4), 2)
    assert len(entry_paths(folder)) == 2


def test_a_forged_index_leads_to_no_wrong_answer(folder: Path) -> None:
    """Other ids for the same keys: the entry's own are compared before its KV is used."""
    with open_store(folder) as store:
        tree = store._catalogue.tree
        for node in tree.nodes.values():
            node.token_ids = node.token_ids + np.uint32(0)
        key = store._walk(as_ids(OTHER), "").nodes[0].key
        tree.nodes[key].token_ids[2] = 8
        store._catalogue.is_index_old = True
    with open_store(folder) as store:
        assert store.match(as_ids((7, 7, 8))) == 3
        assert store.load(as_ids((7, 7, 8)), 0, 3) is None


def test_random_bytes_are_never_believed(folder: Path) -> None:
    """500 files with one to eight bytes changed anywhere: the right KV or none."""
    path, luck = path_of(folder, OTHER), random.Random(0)
    content = path.read_bytes()
    believed = 0
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(luck.randint(1, 8)):
            changed[luck.randrange(len(changed))] = luck.randrange(256)
        path.write_bytes(changed)
        store = open_store(folder)
        kv = store.load(as_ids(OTHER), 0, 3)
        if kv is not None:
            assert torch.equal(kv, kv_of(OTHER))
            believed += 1
        store.close()
        path.parent.mkdir(exist_ok=True)
    assert believed < 5  # a byte may be changed to what it was


def test_verify_puts_the_bad_ones_aside(folder: Path) -> None:
    flip(path_of(folder, BELOW), -1)
    found = upkeep.verify_store(folder)
    assert (found.entries, [why for _, why in found.bad]) == (3, ["its KV is not what was written"])
    assert upkeep.verify_store(folder).bad == []
    assert upkeep.describe_store(folder)["quarantined"] == 1
    cleaned = upkeep.clean_store(folder, None, quarantine_days=0)
    assert (cleaned.quarantined, cleaned.entries) == (1, 2)


def test_a_header_is_ours_to_the_byte(tmp_path: Path) -> None:
    """An entry of another schema, right in all else, is not believed. Seen red: a header of which
    only what is needed was looked at."""
    head = Head("0" * 64, "1" * 64, 1, 4, "float32", (2, 2, 3), "0" * 32)
    kv = torch.zeros(head.kv_bytes, dtype=torch.uint8)
    entry.write_entry(tmp_path / "e", head, as_ids(TOP), kv)
    entry.map_entry(tmp_path / "e")
    text = (tmp_path / "e").read_bytes()
    (tmp_path / "e").write_bytes(text.replace(b'"schema":"1"', b'"schema":"2"'))
    with pytest.raises(BadEntry, match="header"):
        entry.map_entry(tmp_path / "e")


def test_a_file_that_came_in_the_place_of_a_checked_one_is_checked(folder: Path) -> None:
    """Seen red: entries known as good by their names alone."""
    path = path_of(folder, OTHER)
    with open_store(folder) as store:
        check_prompt(store, OTHER, 3)
        content = bytearray(path.read_bytes())
        content[-1] ^= 4
        os.replace(path, folder.parent / "old")  # it keeps its inode, so the new one has another
        path.write_bytes(content)
        assert store.load(as_ids(OTHER), 0, 3) is None
