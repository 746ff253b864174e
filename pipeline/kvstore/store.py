"""KV of prompt prefixes, kept on disk across runs: match, load, put. Knows ids and KV, never text.

A store is a cache: whatever happens to its folder is a miss, counted and said once, and never an
error of the job that uses it. What a load returns was written for exactly these token ids by the
same model, tokenizer, dtype and rope settings, below the same salt and tenant.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock, RLock
from typing import Self

import torch
from torch import Tensor

from pipeline.kvstore.catalogue import Catalogue, reason
from pipeline.kvstore.checked_entries import CheckedEntries
from pipeline.kvstore.entry import MappedEntry, encode_kv, write_entry
from pipeline.kvstore.folder import FileState, StoreFolder
from pipeline.kvstore.header import DTYPES, BadEntry, Head
from pipeline.kvstore.identity import Identity, TokenIds, entry_key
from pipeline.kvstore.stats import StoreStats
from pipeline.kvstore.tree import Node, Walk
from pipeline.storage.durable import publish, temp_path
from pipeline.storage.lock import LOCK_NAME, FileLock, HeldElsewhere

_logger = logging.getLogger("coppice")


class KVStore:
    """One folder, one writer, any number of readers. Several threads may call it."""

    def __init__(
        self,
        catalogue: Catalogue,
        identity: Identity,
        budget_bytes: int,
        salt: str,
        lock: FileLock | None,
    ) -> None:
        """Use `open`."""
        self.is_writer = lock is not None
        self.stats = StoreStats()
        self._catalogue = catalogue
        self._identity = identity
        self._digest = identity.digest()
        self._budget_bytes = budget_bytes
        self._salt = salt
        self._lock = lock
        self._roots: dict[str, str] = {}
        self._entries = CheckedEntries(identity)
        self._said: set[str] = set()
        self._guard = RLock()  # the tree; never held while KV is read or written
        self._putting = Lock()

    @classmethod
    def open(cls, folder: Path, identity: Identity, budget_bytes: int, salt: str = "") -> KVStore:
        """Open or make the store. Whoever is first writes; the others only read, and say so.

        Raises UsageError where the folder cannot be a store.
        """
        if identity.dtype not in DTYPES:
            raise ValueError(f"KV of dtype {identity.dtype} cannot be stored; known: {[*DTYPES]}")
        opened = StoreFolder.open(folder, create=True)
        lock, why_not = _try_lock(folder)
        catalogue = Catalogue(opened, is_writer=lock is not None)
        store = cls(catalogue, identity, budget_bytes, salt, lock)
        try:
            if lock is None:
                store._say_once("reader", f"the KV store {folder} is only read: {why_not}")
            else:
                with suppress(OSError):
                    opened.drop_temps()
            store.refresh()
            if store.is_writer:
                with suppress(OSError):
                    catalogue.make_room(0, budget_bytes)
        except BaseException:
            store.close()
            raise
        return store

    def refresh(self) -> None:
        """See what other processes have added and removed since."""
        with self._guard:
            bad = len(self._catalogue.bad)
            try:
                self._catalogue.refresh()
            except OSError as error:
                self._say_once("list", f"the KV store cannot be listed ({error.strerror})")
            if len(self._catalogue.bad) > bad:
                self._say_bad(self._catalogue.bad[-1][1])
            self._count()
            self.stats.other_identity = self._catalogue.count_foreign(self._digest)

    def match(self, token_ids: TokenIds, tenant: str = "") -> int:
        """How many first tokens of a prompt [n] of a tenant are stored. Touches no file."""
        with self._guard:
            walk = self._walk(token_ids, tenant)
        if walk.length:
            self.stats.hits += 1
        else:
            self._miss()
        return walk.length

    def load(self, token_ids: TokenIds, low: int, high: int, tenant: str = "") -> Tensor | None:
        """KV of positions `[low, high)` below `token_ids[:low]`; None where they are not there.

        [layers, 2, kv_heads, high - low, head_dim] in the model's dtype, on the CPU; mapped from
        the file where one entry holds them all. Each file is checked once per process.
        """
        if not 0 <= low < high <= len(token_ids):
            raise ValueError(f"positions [{low}, {high}) of a prompt of {len(token_ids)} tokens")
        begin = time.perf_counter()
        with self._guard:
            walk = self._walk(token_ids[:high], tenant)
            pieces = [piece for piece in walk.pieces() if piece[2] > low]
        parts = []
        for node, first, end in pieces if walk.length == high else []:
            entry = self._read(node)
            if entry is None:
                break
            start = max(first, low)
            parts.append(entry.kv.narrow(3, start - entry.head.low, end - start))
        if not parts or len(parts) < len(pieces):
            self._miss()
            return None
        with self._guard:
            self._catalogue.touch(walk.nodes)
        kv = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        self.stats.loaded_tokens += high - low
        self.stats.loaded_bytes += kv.numel() * kv.element_size()
        self.stats.load_s += time.perf_counter() - begin
        return kv

    def put(self, token_ids: TokenIds, low: int, kv: Tensor, tenant: str = "") -> bool:
        """Keep KV of positions `[low, len(token_ids))`, those of them that are not there yet.

        False: all there already, not the writer, no room, `[0, low)` not stored, values that are
        not finite, or a disk that refuses, which is said once. `kv` as `load` returns it.
        """
        self._check_shape(kv, len(token_ids) - low)
        if not self._may_write():
            return False
        with self._putting:
            with self._guard:
                stored = self._walk(token_ids, tenant)
            if not low <= stored.length < len(token_ids):
                return False
            encoded = encode_kv(kv.narrow(3, stored.length - low, len(token_ids) - stored.length))
            if encoded is None:
                self._say_once("finite", "KV with values that are not finite is not stored")
                return False
            head = Head(
                self._digest, self._root(tenant), stored.length, len(token_ids),
                self._identity.dtype, self._identity.layout, encoded[1],
            )  # fmt: skip
            try:
                return self._write(head, token_ids, encoded[0], stored)
            except OSError as error:
                self._say_once("write", f"the KV store keeps nothing new: {error.strerror}")
                return False

    def close(self) -> None:
        """Write the index and let another process write."""
        if self._lock is not None:
            if self._may_write():
                self._catalogue.save_index()
            self._lock.release()
            self._lock = None
            self.is_writer = self._catalogue.is_writer = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, head: Head, token_ids: TokenIds, kv: Tensor, stored: Walk) -> bool:
        """Publish an entry and enter it. Raises OSError."""
        key = entry_key(head.root, token_ids, head.low)
        with self._guard:
            fits = self._catalogue.make_room(head.file_bytes, self._budget_bytes, stored.nodes)
            self._count()
        if not fits:
            return False
        folder = self._catalogue.folder
        path = folder.entry_path(key)
        temp = temp_path(path)
        try:
            folder.make_shelf(key)
            write_entry(temp, head, token_ids, kv)
            publish(temp, path)
        except BaseException:
            for left in (temp, path):  # renamed or not, it is counted nowhere
                with suppress(OSError):
                    left.unlink(missing_ok=True)
            raise
        with self._guard:
            state = FileState(head.file_bytes, time.time_ns())
            is_new = self._catalogue.add(key, head, token_ids.copy(), state) is not None
            self._catalogue.touch(stored.nodes)
            self._catalogue.is_index_old = True
        self.stats.puts += is_new
        return is_new

    def _may_write(self) -> bool:
        """Whether the folder is still the one that we hold the lock of."""
        if self.is_writer and not (self._lock and self._lock.is_held):
            self.is_writer = self._catalogue.is_writer = False
            path = self._catalogue.folder.path
            self._say_once("gone", f"the KV store {path} was deleted; nothing new is kept in it")
        return self.is_writer

    def _read(self, node: Node) -> MappedEntry | None:
        """The entry of a node; None where it is bad or gone."""
        try:
            return self._entries.read(self._catalogue.folder.entry_path(node.key), node)
        except FileNotFoundError:  # evicted by the writer, or the whole store deleted
            with self._guard:
                if self._catalogue.tree.nodes.get(node.key) is node:
                    self._catalogue.forget(node)
        except (BadEntry, OSError) as error:
            self._put_aside(node, error)
        return None

    def _put_aside(self, node: Node, error: BadEntry | OSError) -> None:
        why = reason(error)
        with self._guard:
            is_bad = self._catalogue.put_aside(node.key, error)
            self._count()
        if not is_bad:
            self._say_once("ours", f"an entry of the KV store could not be read: {why}")
            return
        self._say_bad(why)

    def _say_bad(self, why: str) -> None:
        self._say_once(
            "bad",
            f"an entry of the KV store was bad ({why}) and is computed again; it lies in "
            f"{self._catalogue.folder.quarantine_path}; `coppice recycle verify` checks the others",
        )

    def _walk(self, token_ids: TokenIds, tenant: str) -> Walk:
        return self._catalogue.tree.walk(self._root(tenant), token_ids)

    def _root(self, tenant: str) -> str:
        if tenant not in self._roots:
            self._roots[tenant] = self._identity.root(self._salt, tenant)
        return self._roots[tenant]

    def _miss(self) -> None:
        self.stats.misses += 1
        foreign = self.stats.other_identity
        if foreign and foreign == len(self._catalogue.tree.nodes):
            self._say_once(
                "foreign",
                f"the KV store {self._catalogue.folder.path} holds states of other models, "
                f"tokenizers or dtypes ({foreign:,} entries) and none of this job's; "
                "they are not used",
            )

    def _count(self) -> None:
        self.stats.evictions = self._catalogue.evicted
        self.stats.quarantined = len(self._catalogue.bad)

    def _check_shape(self, kv: Tensor, length: int) -> None:
        layers, kv_heads, head_dim = self._identity.layout
        expected = (layers, 2, kv_heads, length, head_dim)
        if tuple(kv.shape) != expected or str(kv.dtype) != f"torch.{self._identity.dtype}":
            raise ValueError(
                f"KV is {tuple(kv.shape)} of {kv.dtype}; the store wants {expected} of "
                f"{self._identity.dtype}"
            )

    def _say_once(self, what: str, line: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _logger.warning("%s", line)


def _try_lock(folder: Path) -> tuple[FileLock | None, str]:
    """The writer's lock, or None and why not."""
    try:
        return FileLock(folder / LOCK_NAME), ""
    except HeldElsewhere as held:
        return None, f"{held.owner} writes to it, so nothing new of this job is kept"
    except OSError as error:
        return None, f"it cannot be written to ({error.strerror})"
