"""A decode step without Python in its way: recorded once a bucket of sizes, then replayed.

A step of a small model is over before Python has started its hundreds of kernels. A CUDA graph
starts them all at once, but only with the shapes and addresses it was recorded with. So sizes are
rounded up to buckets, every bucket has input memory of its own that each step is written into, and
what pads it does nothing: no work items, and KV written to a slot that nobody reads.

```
 host      step 0 ─► | step 1 ─►  read 0 | step 2 ─►  read 1 |
 device              | step 0            | step 1            | step 2       each feeds the next
```

Steps of the same rows need no token from the host, so the next one is on its way before the last
one is read (`strides.py`). An engine keeps what it has recorded, and the KV memory that it points
at, from one job to the next (`recordings.py`). Only the host side has been run, by tests on a CPU
with a stand-in for the graph. Nobody has recorded or replayed a graph of it on a card yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.kernels.work_items import SMALL_ROWS, WorkShape
from pipeline.engine.memory import is_exhausted
from pipeline.engine.packing import PackedBatch
from pipeline.engine.sampling import Sampled
from pipeline.engine.step_memory import DecodeStep, Replay, StepMemory

_logger = logging.getLogger("coppice")
_FEWEST_TOKENS = 8


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
        self._buckets: dict[WorkShape, StepMemory] = {}
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
        bucket = self.start(step)
        return NextTokens(bucket.read(), bucket.logits[: len(step.token_ids)])

    @torch.inference_mode()
    def start(self, step: DecodeStep) -> StepMemory:
        """As a call, whose tokens `read` of what this returns waits for."""
        work = self._kernel.plan(step.spans, step.positions)
        bucket = self._bucket_of(work.shape)
        bucket.load(step, work)
        self._run(bucket)
        return bucket

    @torch.inference_mode()
    def go_on(self, bucket: StepMemory, goes_on: NDArray[np.bool_]) -> None:
        """Start the step after the newest one of `bucket`, whose tokens it is fed with and need not
        be read, but for those before it. See `StepMemory.advance`."""
        bucket.advance(goes_on)
        self._run(bucket)

    def _bucket_of(self, shape: WorkShape) -> StepMemory:
        if self._record is None:
            return StepMemory(shape, self._kernel, self._scratch_slot)
        shape = round_up(shape, self._kernel)
        if shape not in self._buckets:
            self._buckets[shape] = StepMemory(shape, self._kernel, self._scratch_slot)
        return self._buckets[shape]

    def _run(self, bucket: StepMemory) -> None:
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
        bucket.fetch()

    def _compute(self, bucket: StepMemory) -> None:
        """Twice is once: what it is fed with it does not change."""
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
