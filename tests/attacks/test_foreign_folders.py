"""Folders of another user: what we load or believe is ours, and writable by nobody else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.engine.kernels import native
from pipeline.errors import UsageError
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.kvstore.entry import map_entry
from pipeline.kvstore.folder import StoreFolder
from pipeline.kvstore.header import BadEntry
from pipeline.model import machine
from pipeline.private_folder import NotPrivate, private_folder

STRANGER = 54321


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def as_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on the disk is somebody else's from now on."""
    monkeypatch.setattr("os.geteuid", lambda: STRANGER)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_every_folder_that_is_made_is_0700_whatever_the_umask(
    tmp_path: Path, open_umask: None
) -> None:
    """Seen red: `mkdir(mode=0o700, parents=True)` made those above it 0777."""
    made = private_folder(tmp_path / "a" / "b" / "c")
    assert [mode_of(path) for path in (made, *made.parents[:2])] == [0o700] * 3


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used_and_not_changed(
    tmp_path: Path, mode: int
) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(NotPrivate, match="others may write to .*chmod"):
        private_folder(tmp_path)
    assert tmp_path.stat().st_mode & 0o7777 == mode


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, as_stranger: None) -> None:
    with pytest.raises(NotPrivate, match="belongs to another user"):
        private_folder(tmp_path)


def test_a_kernel_of_another_user_is_not_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: with a shared HOME another user's `native-*.so` was loaded."""
    loaded = []
    monkeypatch.setattr("ctypes.CDLL", lambda path: loaded.append(path))
    monkeypatch.setattr(native, "_build", lambda compiler, library: library.write_bytes(b"ours"))
    folder = private_folder(cache / "kernels")
    monkeypatch.setattr("os.geteuid", lambda: STRANGER)
    native._why_unavailable.cache_clear()
    try:
        why = native.why_unavailable()
    finally:
        native._why_unavailable.cache_clear()
    assert loaded == []
    if why not in ("this CPU has no AVX-512", "this build of torch has no oneDNN"):
        assert why is not None and f"{folder} belongs to another user" in why


def test_a_kernel_that_others_could_have_written_is_built_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = private_folder(cache / "kernels")
    library = folder / "native-0.so"
    library.write_bytes(b"theirs")
    library.chmod(0o777)
    with pytest.raises(NotPrivate):
        native._open_ours(library)
    library.chmod(0o700)
    os.close(native._open_ours(library))
    link = folder / "native-1.so"
    link.symlink_to(library)
    with pytest.raises(OSError):
        native._open_ours(link)


def test_compiled_kernels_are_their_users_alone_under_umask_000(
    cache: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: library and folders 0777."""

    def compile_(command: list[str], **_: object) -> None:
        Path(command[-1]).write_bytes(b"machine code")
        os.chmod(command[-1], 0o777)

    monkeypatch.setattr(subprocess, "run", compile_)
    library = machine.private_cache("kernels") / "native-0.so"
    native._build("c++", library)
    assert mode_of(library) == 0o700
    assert [mode_of(path) for path in library.parents[:3]] == [0o700] * 3


def test_the_plan_of_another_user_is_not_gone_on_with(
    cache: Path, as_stranger: None, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "plans").mkdir(parents=True, mode=0o755)
    assert Checkpoint.open("0" * 24) is None
    assert "belongs to another user" in caplog.text


def test_a_store_of_another_user_is_not_used(tmp_path: Path, as_stranger: None) -> None:
    """Seen red: with V negated and new checksums 65 of 100 answers changed."""
    with pytest.raises(UsageError, match="the KV store .*belongs to another user.*name"):
        StoreFolder.open(tmp_path, create=True)


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o2775])
def test_a_shared_folder_named_as_the_store_is_refused_and_not_changed(
    tmp_path: Path, mode: int
) -> None:
    """Seen red: `--kv-store` on an empty shared folder took the others' rights away."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(UsageError, match="others may write"):
        StoreFolder.open(shared, create=True)
    assert shared.stat().st_mode & 0o7777 == mode and list(shared.iterdir()) == []


def test_a_store_that_others_may_read_stays_as_it_is(tmp_path: Path) -> None:
    """Its files are 0600 and its shelves 0700, so there is nothing to read in it."""
    tmp_path.chmod(0o755)
    StoreFolder.open(tmp_path, create=True).make_shelf("ab" * 32)
    assert mode_of(tmp_path) == 0o755 and mode_of(tmp_path / "ab") == 0o700


def test_a_new_store_is_0700_under_umask_000(tmp_path: Path, open_umask: None) -> None:
    store = tmp_path / "a" / "store"
    StoreFolder.open(store, create=True)
    assert mode_of(store) == mode_of(store.parent) == 0o700


def test_an_entry_of_another_user_is_bad(tmp_path: Path, as_stranger: None) -> None:
    entry = tmp_path / "entry"
    entry.write_bytes(b"\0" * 100)
    entry.chmod(0o600)
    with pytest.raises(BadEntry, match="belongs to another user"):
        map_entry(entry)
