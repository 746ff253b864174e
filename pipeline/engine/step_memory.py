"""Memory of a recorded decode step, at addresses that never change. Knows no model.

```
 host       [ work items | slots | token ids ]   what a step differs in from the last one
 pinned     two of them: one is filled while the other is still on its way
 device     [ work items | slots | token ids ]   fed: token ids stay as the last step chose them
 device     [ chosen ids | whether finite ]
 pinned     two of them: one is read while the next step fills the other
```
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.engine.kernels.rules import KVSpans
from pipeline.engine.kernels.triton_kernel import DeviceWork, TritonKernel
from pipeline.engine.kernels.work_items import ITEM_FIELDS, WorkItems, WorkShape
from pipeline.engine.packing import PackedBatch
from pipeline.engine.sampling import Sampled

Replay = Callable[[], None]
"""Starts the recorded kernels on what the same memory now holds."""
_KV_END = 3  # of an item's fields


class DecodeStep(NamedTuple):
    """One new token a row: `token_ids`, `positions`, `slots` [rows], int64; what the rows see."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    spans: KVSpans


class StepMemory:
    """Of one shape. At most two steps of it are on their way at a time."""

    logits: torch.Tensor
    replay: Replay | None = None
    has_run: bool = False

    def __init__(self, shape: WorkShape, kernel: TritonKernel, scratch_slot: int) -> None:
        """`scratch_slot` of the arena belongs to no range."""
        tokens = shape.tokens
        self._shape, self._scratch, self._rows = shape, scratch_slot, 0
        self._device, self._is_cuda = kernel.device, kernel.device.type == "cuda"
        length = sum(shape.lengths)
        self._host = np.zeros(length + 2 * tokens, np.int64)
        self._slots, self._token_ids = self._host[length:].reshape(2, tokens)
        self._positions = self._host[sum(shape.lengths[:-1]) :][:tokens]
        there = torch.zeros(len(self._host), dtype=torch.int64, device=kernel.device)
        flat, slots, self._fed = torch.split(there, [length, tokens, tokens])
        work = DeviceWork.view(flat, shape, kernel.block_m, kernel.rep)
        self.batch = PackedBatch(
            input_ids=self._fed.unsqueeze(0),
            position_ids=work.positions[:tokens].unsqueeze(0),
            slots=slots,
            kernel=kernel,
            work=work,
        )
        self.chosen = torch.zeros(2, tokens, dtype=torch.int64, device=kernel.device)
        self._ways = [_Way(there, self.chosen, length + tokens, self._is_cuda) for _ in range(2)]
        self._unread: deque[_Way] = deque()
        self._is_open = False

    def load(self, step: DecodeStep, work: WorkItems) -> None:
        """Send a step to the device, where it may arrive later than this returns."""
        self._rows = rows = len(step.token_ids)
        self._host[: sum(self._shape.lengths)] = work.flatten(self._shape)
        self._slots[:rows], self._slots[rows:] = step.slots, self._scratch
        self._token_ids[:rows], self._token_ids[rows:] = step.token_ids, 0
        self._settle()
        self._growing: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._is_open = True
        self._ways[0].send(self._host)

    def advance(self, goes_on: NDArray[np.bool_]) -> None:
        """Send the next step of the same rows, each fed with what it has chosen. Rows that do not
        go on, [rows], compute on where they are, and write where nobody reads."""
        if self._growing is None:
            self._growing = self._last_items()
        at, row = self._growing
        more = goes_on.astype(np.int64)
        self._is_open = True
        self._host[at] += more[row]
        self._positions[: self._rows] += more
        self._slots[: self._rows] = np.where(goes_on, self._slots[: self._rows] + 1, self._scratch)
        self._ways[0].send_fed(self._host)
        self._fed.copy_(self.chosen[0])

    def fetch(self) -> None:
        """Have what was chosen sent back, which `read` waits for."""
        self._ways.reverse()
        self._ways[1].fetch()
        self._unread.append(self._ways[1])
        self._is_open = False

    def read(self) -> Sampled:
        """What was fetched first and is not read yet."""
        token_ids, is_finite = self._unread.popleft().read()[:, : self._rows]
        return Sampled(token_ids.copy(), is_finite.astype(np.bool_))

    def _settle(self) -> None:
        """Wait for what a step that failed has left on its way."""
        if (self._unread or self._is_open) and self._is_cuda:
            torch.cuda.synchronize(self._device)
        self._unread.clear()

    def _last_items(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the host's vector says how far each row's own keys reach, and of which row: those
        items end with the slot of its new token, which no other row sees."""
        count = self._shape.large + self._shape.small
        items = self._host[: count * ITEM_FIELDS].reshape(-1, ITEM_FIELDS)
        number = np.flatnonzero(items[:, _KV_END] == self._slots[items[:, 0]] + 1)
        assert len(number) == self._rows, f"{len(number)} own items of {self._rows} rows"
        return number * ITEM_FIELDS + _KV_END, items[number, 0]


class _Way:
    """To the device and back, for one step."""

    def __init__(
        self, there: torch.Tensor, chosen: torch.Tensor, fed_length: int, is_cuda: bool
    ) -> None:
        self._there, self._there_fed = there, there[:fed_length]
        self._sent = torch.zeros(len(there), dtype=torch.int64, pin_memory=is_cuda)
        self._sent_fed = self._sent[:fed_length]
        self._sent_array, self._sent_fed_array = self._sent.numpy(), self._sent_fed.numpy()
        self._chosen = chosen
        self._back = torch.zeros(chosen.shape, dtype=torch.int64, pin_memory=is_cuda)
        self._back_array = self._back.numpy()
        self._is_back = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def send(self, host: NDArray[np.int64]) -> None:
        self._sent_array[:] = host
        self._there.copy_(self._sent, non_blocking=True)

    def send_fed(self, host: NDArray[np.int64]) -> None:
        """All but the token ids."""
        self._sent_fed_array[:] = host[: len(self._sent_fed_array)]
        self._there_fed.copy_(self._sent_fed, non_blocking=True)

    def fetch(self) -> None:
        self._back.copy_(self._chosen, non_blocking=True)
        if self._is_back is not None:
            self._is_back.record()

    def read(self) -> NDArray[np.int64]:
        if self._is_back is not None:
            self._is_back.synchronize()
        return self._back_array
