"""The store as an engine sees it during one run: `KVConnector` of its prompts.

```
 store ─► load (the engine's thread)        keep ─► queue ─► writer thread ─► store
```
"""

from __future__ import annotations

import logging
from queue import Queue
from threading import Condition, Thread
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import place_of
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.store import KVStore

_WAITING_BYTES = 1 << 30  # of KV in memory, before the engine waits for the disk
_logger = logging.getLogger("coppice")


class Prompts(Protocol):
    """The prompts of a run, by the sequences of its plan."""

    def ids(self, sequence: int) -> TokenIds:
        """Token ids of the whole prompt."""

    def tenant(self, sequence: int) -> str:
        """Whose prompt it is; empty: nobody's."""


class StoreConnector:
    """`KVConnector` of one run. `close` it when the engine is done."""

    def __init__(
        self, store: KVStore, prompts: Prompts, wanted: NDArray[np.bool_], least: int
    ) -> None:
        """`wanted`: [nodes] to be kept; `least`: tokens from which on loading is worth it."""
        self._store = store
        self._prompts = prompts
        self._wanted = wanted.copy()
        self._least = least
        self._queue: Queue[tuple[TokenIds, int, Tensor, str] | None] = Queue()
        self._waiting_bytes = 0
        self._written = Condition()
        self._writer = Thread(target=self._write, name="kv-store")
        self._writer.start()

    def stored_end(self, sequence: int, end: int) -> int:
        ids, tenant = self._prompts.ids(sequence)[:end], self._prompts.tenant(sequence)
        length = self._store.match(ids, tenant).length
        return length if length >= self._least else 0

    def load(self, sequence: int, low: int, high: int) -> Tensor | None:
        ids, tenant = self._prompts.ids(sequence), self._prompts.tenant(sequence)
        return self._store.load(ids, low, high, tenant)

    def wants(self, node: int) -> bool:
        """See `KVConnector.wants`; only the first time."""
        is_wanted = bool(self._wanted[node])
        self._wanted[node] = False
        return is_wanted

    def keep(self, sequence: int, low: int, high: int, kv: Tensor) -> None:
        """See `KVConnector.keep`. Waits while the disk is far behind."""
        with self._written:
            self._written.wait_for(lambda: self._waiting_bytes <= _WAITING_BYTES)
            self._waiting_bytes += kv.nbytes
        ids, tenant = self._prompts.ids(sequence)[:high], self._prompts.tenant(sequence)
        self._queue.put((ids, low, kv, tenant))

    def close(self) -> None:
        """Returns when all that was kept is written."""
        self._queue.put(None)
        self._writer.join()

    def _write(self) -> None:
        """Goes on whatever happens: the engine waits for room in the queue."""
        while (kept := self._queue.get()) is not None:
            ids, low, kv, tenant = kept
            try:
                self._store.put(ids, low, kv, tenant)
            except Exception as error:  # a fault of ours, which must cost no job
                _logger.warning("the KV store keeps nothing of a prefix: %s", place_of(error))
            with self._written:
                self._waiting_bytes -= kv.nbytes
                self._written.notify()
