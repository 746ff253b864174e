"""What a person does with a store: list, describe, verify, clean. Needs no model and no device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import StorageError, UsageError
from pipeline.kvstore.catalogue import Catalogue, reason
from pipeline.kvstore.entry import check_entry, map_entry
from pipeline.kvstore.folder import StoreFolder
from pipeline.kvstore.header import BadEntry
from pipeline.kvstore.tree import Node, full_ids, root_of
from pipeline.storage.lock import LOCK_NAME, FileLock, HeldElsewhere

_DAY_NS = 24 * 3600 * 10**9


class Verified(NamedTuple):
    """`bad`: (key, what is wrong); those were put aside. An entry below a bad one is of no use."""

    entries: int
    bytes: int
    bad: list[tuple[str, str]]


class Cleaned(NamedTuple):
    """What `clean_store` has removed and left."""

    evicted: int
    temps: int
    quarantined: int
    entries: int
    bytes: int


def list_store(folder: Path) -> list[dict[str, Any]]:
    """Every entry, the last used first. `tokens`: its own; `depth`: of the prefix that it ends."""
    catalogue = _read(folder)
    nodes = sorted(catalogue.tree.nodes.values(), key=lambda node: (-node.last_used, node.key))
    return [
        {
            "key": node.key,
            "tokens": len(node.token_ids),
            "depth": node.high,
            "bytes": node.size,
            "last_used": node.last_used / 1e9,
            "identity": catalogue.identities[root_of(node)],
        }
        for node in nodes
    ]


def describe_store(folder: Path) -> dict[str, Any]:
    """Sums over all entries. A tree is what one tenant of one model has."""
    catalogue = _read(folder)
    nodes = list(catalogue.tree.nodes.values())
    identities = Counter(catalogue.identities[root_of(node)] for node in nodes)
    aside = catalogue.folder.list_quarantine()
    return {
        "entries": len(nodes),
        "tokens": sum(len(node.token_ids) for node in nodes),
        "bytes": sum(node.size for node in nodes),
        "deepest": max((node.high for node in nodes), default=0),
        "trees": len({root_of(node) for node in nodes}),
        "identities": dict(identities),
        "oldest": min((node.last_used for node in nodes), default=0) / 1e9,
        "newest": max((node.last_used for node in nodes), default=0) / 1e9,
        "quarantined": len(aside),
        "quarantined_bytes": sum(state.size for _, state in aside),
    }


def verify_store(folder: Path) -> Verified:
    """Read every entry as a job would and put the bad ones aside."""
    catalogue = _read(folder)
    nodes = list(catalogue.tree.nodes.values())
    size = sum(node.size for node in nodes)
    for node in nodes:
        try:
            _check(catalogue, node)
        except FileNotFoundError:  # evicted meanwhile
            continue
        except (BadEntry, OSError) as error:
            if not catalogue.put_aside(node.key, error):
                raise StorageError(f"cannot read {folder} ({reason(error)}); try again") from error
    return Verified(len(nodes), size, catalogue.bad)


def clean_store(folder: Path, budget_bytes: int | None, quarantine_days: float) -> Cleaned:
    """Evict to the budget, drop temporary files and what was put aside long ago, index anew.

    Raises UsageError while a job writes to the store, StorageError where the disk refuses.
    """
    opened = StoreFolder.open(folder, create=False)
    with _disk_errors(folder), _locked(folder):
        temps = opened.drop_temps()
        since = time.time_ns() - quarantine_days * _DAY_NS
        old = [path for path, state in opened.list_quarantine() if state.last_used < since]
        for path in old:
            opened.drop_quarantined(path)
        with suppress(FileNotFoundError):
            opened.index_path.unlink()
        catalogue = Catalogue(opened, is_writer=True)
        catalogue.refresh()
        if budget_bytes is not None:
            catalogue.make_room(0, budget_bytes)
        catalogue.save_index()
    entries = len(catalogue.tree.nodes)
    return Cleaned(catalogue.evicted, temps, len(old), entries, catalogue.used_bytes)


def _check(catalogue: Catalogue, node: Node) -> None:
    """Raises BadEntry, OSError."""
    catalogue.read_head(node.key)
    entry = map_entry(catalogue.folder.entry_path(node.key))
    if entry.head.root != root_of(node) or not np.array_equal(entry.token_ids, full_ids(node)):
        raise BadEntry("it is another entry than its name says")
    check_entry(entry)


def _read(folder: Path) -> Catalogue:
    catalogue = Catalogue(StoreFolder.open(folder, create=False), is_writer=False)
    with _disk_errors(folder):
        catalogue.refresh()
    return catalogue


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the KV store {folder} cannot be read or changed ({error.strerror}); check the disk"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = FileLock(folder / LOCK_NAME)
    except HeldElsewhere as held:
        raise UsageError(
            f"{held.owner} writes to the KV store {folder}; wait until it ends"
        ) from held
    try:
        yield
    finally:
        lock.release()
