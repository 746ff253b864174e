"""The store as an engine sees it during one run: `KVConnector` of its prompts.

```
 store ─► load (the engine's thread)        keep ─► queue ─► writer thread ─► store
```
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Queue
from threading import Condition, Thread

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import place_of
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.store import KVStore

Ids = NDArray[np.unsignedinteger]
"""Of a prompt from position 0 on, in any byte order."""

_WAITING_BYTES = 1 << 30  # of KV in memory, before the engine waits for the disk
_logger = logging.getLogger("coppice")


class StoreConnector:
    """`KVConnector` of one run. `close` it when the engine is done."""

    def __init__(
        self,
        store: KVStore,
        tenant_of: Callable[[int], str],
        wanted: NDArray[np.bool_],
        least: int,
    ) -> None:
        """`tenant_of` a sequence, empty: nobody; `wanted`: [parts] to be kept; `least`: tokens
        from which on loading is worth it."""
        self._store = store
        self._tenant_of = tenant_of
        self._wanted = wanted.copy()
        self._least = least
        self._queue: Queue[tuple[TokenIds, int, Tensor, str] | None] = Queue()
        self._waiting_bytes = 0
        self._written = Condition()
        self._writer = Thread(target=self._write, name="kv-store")
        self._writer.start()

    def stored_end(self, sequence: int, ids: Ids) -> int:
        length = self._store.match(ids.astype(np.uint32), self._tenant_of(sequence))
        return length if length >= self._least else 0

    def load(self, sequence: int, ids: Ids, low: int, high: int) -> Tensor | None:
        return self._store.load(ids.astype(np.uint32), low, high, self._tenant_of(sequence))

    def wants(self, key: int) -> bool:
        """See `KVConnector.wants`; only the first time."""
        is_wanted = bool(self._wanted[key])
        self._wanted[key] = False
        return is_wanted

    def keep(self, sequence: int, ids: Ids, low: int, high: int, kv: Tensor) -> None:
        """See `KVConnector.keep`. Waits while the disk is far behind."""
        with self._written:
            self._written.wait_for(lambda: self._waiting_bytes <= _WAITING_BYTES)
            self._waiting_bytes += kv.nbytes
        self._queue.put((ids[:high].astype(np.uint32), low, kv, self._tenant_of(sequence)))

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
