"""Folder and tree kept in step: what is stored, how much of it, and what gives way. No tensors.

The entries are the truth. The index, the tree and the number of bytes follow from them.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Collection
from contextlib import suppress

from pipeline.errors import StorageError
from pipeline.kvstore.folder import FileState, StoreFolder
from pipeline.kvstore.header import BadEntry, Head, read_head
from pipeline.kvstore.identity import TokenIds, entry_key
from pipeline.kvstore.index import read_index, write_index
from pipeline.kvstore.tree import Node, PrefixTree, root_of

_WORTH_AN_INDEX = 1000  # entries that were read one by one at open: the next one need not
_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EFAULT, errno.ELOOP, errno.ENXIO)
_logger = logging.getLogger("coppice")


class Catalogue:
    """What is in a store's folder. Only the one writer removes anything good.

    `identities`: of each root. `used_bytes`: files of entries, and of the quarantine. `bad`: key of
    each entry that was put aside, and what was wrong with it.
    """

    def __init__(self, folder: StoreFolder, is_writer: bool) -> None:
        self.folder = folder
        self.is_writer = is_writer
        self.tree = PrefixTree()
        self.identities: dict[str, str] = {}
        self.used_bytes = 0
        self.bad: list[tuple[str, str]] = []
        self.evicted = 0
        self.is_index_old = False

    def refresh(self) -> None:
        """See what is in the folder. Raises OSError if it cannot be listed.

        Most of a large store comes from its index; what that does not know is read from the
        entries, so an index that is missing, damaged or old is a matter of time only.
        """
        listed = self.folder.list_entries()
        for key in [key for key in self.tree.nodes if key not in listed]:
            if node := self.tree.nodes.get(key):
                self.forget(node)
        self._take_from_index(listed)
        read = self._read_heads(sorted(listed.keys() - self.tree.nodes.keys()))
        read.sort(key=lambda item: (item[1].low, item[1].high, item[0]))
        for key, head, token_ids in read:
            if self.add(key, head, token_ids, listed[key]) is None and self.is_writer:
                with suppress(OSError):
                    self.folder.remove(key)  # nothing leads to it, or something else does
        self.used_bytes = sum(node.size for node in self.tree.nodes.values())
        self.used_bytes += sum(state.size for _, state in self.folder.list_quarantine())
        self.is_index_old |= bool(read)
        if len(read) >= _WORTH_AN_INDEX:
            self.save_index()

    def add(self, key: str, head: Head, token_ids: TokenIds, state: FileState) -> Node | None:
        """Enter an entry that is in the folder; None where nothing leads to it."""
        node = self.tree.insert(head.root, key, token_ids, head.low)
        if node is not None:
            self.identities[head.root] = head.identity
            self._count(node, state)
        return node

    def forget(self, node: Node) -> None:
        """Take an entry that is gone from the folder out of the tree, and all that hung on it."""
        for gone in self.tree.remove(node):
            self.used_bytes -= gone.size
            if self.is_writer and gone is not node:
                with suppress(OSError):
                    self.folder.remove(gone.key)
        self.is_index_old = True

    def put_aside(self, key: str, error: BadEntry | OSError) -> bool:
        """Move a bad entry to the quarantine, if that is possible, and forget it.

        False where the error says nothing about the entry: say, this process has too many files.
        """
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            return False
        self.bad.append((key, reason(error)))
        with suppress(OSError):
            self.used_bytes += self.folder.quarantine(key)
        if node := self.tree.nodes.get(key):
            self.forget(node)
        return True

    def make_room(self, wanted: int, budget: int, spared: Collection[Node] = ()) -> bool:
        """Remove what was used the longest ago until `wanted` more bytes fit into the budget.

        What was put aside goes first, and of the entries those that nothing hangs on. False where
        it cannot be done. Raises OSError.
        """
        if wanted > budget:
            return False
        if self.used_bytes + wanted > budget:
            for path, state in self.folder.list_quarantine():
                if self.used_bytes + wanted <= budget:
                    break
                self.folder.drop_quarantined(path)
                self.used_bytes -= state.size
        while self.used_bytes + wanted > budget:
            node = self.tree.oldest_leaf(spared)
            if node is None:
                return False
            self.folder.remove(node.key)
            self.forget(node)
            self.evicted += 1
        return True

    def touch(self, nodes: Collection[Node]) -> None:
        """These entries are used now; the moment is kept beyond this process."""
        now = time.time_ns()
        for node in nodes:
            node.last_used = now
            self.folder.touch(node.key, now)

    def count_foreign(self, identity: str) -> int:
        """Entries of other identities."""
        ours = {root for root, known in self.identities.items() if known == identity}
        return sum(root_of(node) not in ours for node in self.tree.nodes.values())

    def save_index(self) -> None:
        """Write the index if it is not up to date; a disk that refuses is warned of."""
        if not (self.is_writer and self.is_index_old):
            return
        try:
            write_index(self.folder.index_path, self.tree, self.identities)
            self.is_index_old = False
        except StorageError as error:
            _logger.warning("the KV store opens slowly next time: %s", error)

    def _take_from_index(self, listed: dict[str, FileState]) -> None:
        """Enter those of its rows that are in the folder and whose parents are in the tree."""
        index = read_index(self.folder.index_path)
        if index is None:
            self.is_index_old = True
            return
        self.identities |= dict(index.roots)
        nodes: list[Node | None] = []
        for key, place, low, token_ids in index.rows:
            node = self.tree.nodes.get(key)
            if node is None and key in listed:
                parent = self.tree.root(index.roots[-1 - place][0]) if place < 0 else nodes[place]
                node = None if parent is None else self.tree.attach(parent, key, token_ids, low)
                if node is not None:
                    self._count(node, listed[key])
            elif node is None:
                self.is_index_old = True
            nodes.append(node)

    def _count(self, node: Node, state: FileState) -> None:
        node.size, node.last_used = state
        self.used_bytes += node.size

    def _read_heads(self, keys: list[str]) -> list[tuple[str, Head, TokenIds]]:
        """Of those that are good, as far as their heads say; the others are put aside."""
        found = []
        for key in keys:
            try:
                head, token_ids = self.read_head(key)
                found.append((key, head, token_ids))
            except FileNotFoundError:  # evicted meanwhile
                continue
            except (BadEntry, OSError) as error:
                self.put_aside(key, error)
        return found

    def read_head(self, key: str) -> tuple[Head, TokenIds]:
        """Of the file of this name, which is that of its content. Raises BadEntry, OSError."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(self.folder.entry_path(key), flags)
        try:
            head, token_ids = read_head(file)
        finally:
            os.close(file)
        if entry_key(head.root, token_ids, head.low) != key:
            raise BadEntry("its token ids are not those of its name")
        return head, token_ids


def reason(error: BadEntry | OSError) -> str:
    """What is wrong, in words that quote nothing."""
    return str(error.strerror) if isinstance(error, OSError) else str(error)
