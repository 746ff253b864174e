"""A decode step without Python in its way: recorded once a bucket of sizes, then replayed.

A step of a small model is over before Python has started its hundreds of kernels. A CUDA graph
starts them all at once, but only with the shapes and addresses it was recorded with. So sizes are
rounded up to buckets, every bucket has input memory of its own that each step is written into, and
what pads it does nothing: no work items, and KV written to a slot that nobody reads.

```
 host, pinned     [ work items | token ids | slots ]      one copy a step
 device           [ work items | token ids | slots ] -> forward -> logits -> argmax -> [2, tokens]
 host                                                     one synchronisation: reading the result
```

An engine keeps what it has recorded, and the KV memory that it points at, from one job to the next
(`recordings.py`). Only the host side has been run, by tests on a CPU with a stand-in for
the graph. Nobody has recorded or replayed a graph of it on a card yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.rules import KVSpans
from pipeline.engine.kernels.triton_kernel import DeviceWork, TritonKernel
from pipeline.engine.kernels.work_items import SMALL_ROWS, WorkItems, WorkShape
from pipeline.engine.memory import is_exhausted
from pipeline.engine.packing import PackedBatch
from pipeline.engine.sampling import Sampled

_logger = logging.getLogger("coppice")
_FEWEST_TOKENS = 8

Replay = Callable[[], None]
"""Starts the recorded kernels on what the same memory now holds."""


class DecodeStep(NamedTuple):
    """One new token a row: `token_ids`, `positions`, `slots` [rows], int64; what the rows see."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    spans: KVSpans


class NextTokens(NamedTuple):
    """`greedy` tokens of the rows; `logits` [rows, V] in the model's dtype, on the device, are
    overwritten by the next step."""

    greedy: Sampled
    logits: Tensor


Recorder = Callable[[Callable[[], None]], Replay]
"""Turns work that has run before on the current device into something that repeats it. The work may
or may not run meanwhile. Raises RuntimeError if it cannot."""


class DecodeRunner:
    """Decodes by recorded steps where there is a recorder, else by plain calls of exact size.

    A bucket's first step is a plain call, which loads what is loaded lazily; the second one is
    recorded. Where that cannot be done the runner says so and goes on with plain calls; where it is
    memory that ends, the error is the caller's, as in a plain call.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        kernel: TritonKernel,
        scratch_slot: int,
        record: Recorder | None,
        notes: list[str] | None = None,
    ) -> None:
        """`forward` gives logits [N, V]; `scratch_slot` of the arena belongs to no range. `notes`
        gets a sentence where recording fails."""
        self._forward = forward
        self._kernel = kernel
        self._scratch_slot = scratch_slot
        self._record = record
        self._notes = [] if notes is None else notes
        self._buckets: dict[WorkShape, _Bucket] = {}
        self._logits: Tensor | None = None

    @property
    def is_recording(self) -> bool:
        """False where there is no recorder, or where recording failed."""
        return self._record is not None

    def describe(self) -> dict[str, int]:
        """How many sizes of steps are known, and how many of them are recorded."""
        return {"sizes": len(self._buckets), "recorded": len(self.replays())}

    def replays(self) -> list[Replay]:
        """What starts each recorded size again, on what was last loaded into it."""
        found = (bucket.replay for bucket in self._buckets.values())
        return [replay for replay in found if replay is not None]

    @torch.inference_mode()
    def __call__(self, step: DecodeStep) -> NextTokens:
        """Write the rows' new KV and choose their next tokens."""
        work = self._kernel.plan(step.spans, step.positions)
        bucket = self._bucket_of(work.shape)
        bucket.load(step, work, self._scratch_slot)
        self._run(bucket)
        rows = len(step.token_ids)
        token_ids, is_finite = bucket.chosen[:, :rows].to("cpu", copy=True).numpy()
        greedy = Sampled(token_ids, is_finite.astype(np.bool_))
        return NextTokens(greedy, bucket.logits[:rows])

    def _bucket_of(self, shape: WorkShape) -> _Bucket:
        if self._record is None:
            return _Bucket(shape, self._kernel)
        shape = round_up(shape, self._kernel)
        if shape not in self._buckets:
            self._buckets[shape] = _Bucket(shape, self._kernel)
        return self._buckets[shape]

    def _run(self, bucket: _Bucket) -> None:
        if self._record is not None and bucket.has_run and bucket.replay is None:
            try:
                bucket.replay = self._record(lambda: self._compute(bucket))
            except RuntimeError as error:  # a model that waits for the device within its forward
                if is_exhausted(error):
                    raise
                note = f"decoding without CUDA graphs: {str(error).splitlines()[0]}"
                _logger.warning(note)
                self._notes.append(note)
                self._record = None
        if bucket.replay is None:
            self._compute(bucket)
        else:
            bucket.replay()
        bucket.has_run = True

    def _compute(self, bucket: _Bucket) -> None:
        logits = self._forward(bucket.batch)
        if not bucket.has_run:
            bucket.logits = self._room_for(logits)
        bucket.logits.copy_(logits)
        best, token_ids = bucket.logits.max(-1)
        bucket.chosen[0].copy_(token_ids)
        bucket.chosen[1].copy_(best.isfinite())

    def _room_for(self, logits: Tensor) -> Tensor:
        """Memory shared by the buckets; one that outgrows it leaves the others what they have."""
        if self._logits is None or len(self._logits) < len(logits):
            self._logits = torch.empty_like(logits)
        return self._logits[: len(logits)]


class _Bucket:
    """Memory of one shape, at addresses that never change."""

    logits: Tensor
    replay: Replay | None = None
    has_run: bool = False

    def __init__(self, shape: WorkShape, kernel: TritonKernel) -> None:
        tokens = shape.tokens
        self._shape = shape
        self._work_length = sum(shape.lengths)
        length = self._work_length + 2 * tokens
        is_pinned = kernel.device.type == "cuda"
        self._host = torch.zeros(length, dtype=torch.int64, pin_memory=is_pinned)
        self._device = torch.zeros(length, dtype=torch.int64, device=kernel.device)
        flat, token_ids, slots = torch.split(self._device, [self._work_length, tokens, tokens])
        work = DeviceWork.view(flat, shape, kernel.block_m, kernel.rep)
        self.batch = PackedBatch(
            input_ids=token_ids.unsqueeze(0),
            position_ids=work.positions[:tokens].unsqueeze(0),
            slots=slots,
            kernel=kernel,
            work=work,
        )
        self.chosen = torch.zeros(2, tokens, dtype=torch.int64, device=kernel.device)

    def load(self, step: DecodeStep, work: WorkItems, scratch_slot: int) -> None:
        """Copy a step to the device, where it may arrive later than this returns.

        The result of the step before must have been read: then the pinned memory is free again.
        """
        rows, tokens = len(step.token_ids), self._shape.tokens
        host = self._host.numpy()
        host[: self._work_length] = work.flatten(self._shape)
        token_ids, slots = host[self._work_length :].reshape(2, tokens)
        token_ids[:rows], token_ids[rows:] = step.token_ids, 0
        slots[:rows], slots[rows:] = step.slots, scratch_slot
        self._device.copy_(self._host, non_blocking=True)


def round_up(shape: WorkShape, kernel: TritonKernel) -> WorkShape:
    """The bucket of a shape: as a rule one for each number of tokens, with little padding.

    Tokens cost a step of the model each, so they are rounded to 2^k or 1.5 x 2^k. Items follow from
    them: as many of both sizes as the kernel aims at, and a small one more for each token; where a
    step has more, the next power of two. Partials follow from items. An empty item costs next to
    nothing, and no large items stay none: that saves a launch a layer.
    """
    tokens = max(shape.tokens, _FEWEST_TOKENS)
    power = _power_of_two(tokens)
    tokens = power * 3 // 4 if tokens <= power * 3 // 4 else power
    large, small = 0, tokens + kernel.items_aimed_at
    if shape.large:
        large = _power_of_two(max(shape.large, kernel.items_aimed_at))
    if shape.small > small:
        small = _power_of_two(shape.small)
    of_large, of_small = (max(1, rows // kernel.rep) for rows in (kernel.block_m, SMALL_ROWS))
    return WorkShape(tokens, large, small, large * of_large + small * of_small, shape.views)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
