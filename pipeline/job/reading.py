"""Rows of a job are read: all of them, and tokenised, or a few as they are.

```
 reader thread ──► channel ──► tokenise a batch ──► token file, parameters, rejected rows
                                                       └── checkpoint, where there are many rows
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.job.channel import Stages
from pipeline.job.job import Job
from pipeline.job.observer import Planning
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.job.prepared_rows import PreparedRows
from pipeline.job.witnesses import Witnesses
from pipeline.plan.token_table import narrowest_dtype
from pipeline.prompts import PromptBatch

_BATCHES_AHEAD = 4


Watch = Callable[[Planning], None]


def ignore(planning: Planning) -> None:
    """Nobody watches."""


def read_rows(job: Job, watch: Watch = ignore) -> PreparedRows:
    """Read and tokenise every row, or what a killed call left. Raises InputError, StorageError."""
    rows = PreparedRows(
        job.preparation(),
        narrowest_dtype(job.tokenizer.vocabulary_size),
        Checkpoint.open(job.key()) if job.source.num_rows > Checkpoint.every_rows else None,
    )
    started, before, total = time.monotonic(), rows.num_rows, job.source.num_rows
    with rows.until_failure(), Stages() as stages:
        batches = stages.channel(_BATCHES_AHEAD)

        def read() -> None:
            for batch in job.source.iter_prompts(rows.num_rows):
                batches.put(batch)
            batches.finish()
            job.source.check_carried_columns()  # damage there must show before the device is used

        stages.start("reader", read)
        witnesses = Witnesses(job.source.turns)
        for batch in batches:
            rows.add(batch)
            witnesses.see(batch)
            watch(Planning(total, rows.num_rows, before, time.monotonic() - started))
        witnesses.check(job.later_turns, rows.rejected())
        rows.save()
    return rows


def select_rows(job: Job, rows: Sequence[int] | NDArray[np.int64]) -> PromptBatch:
    """These input rows as one batch, in input order; its `row_start` means nothing."""
    wanted = np.sort(np.asarray(rows, np.int64))
    chosen = PromptBatch(0, [], [], [], [])
    for batch in job.source.iter_prompts():
        low, high = np.searchsorted(wanted, [batch.row_start, batch.row_start + len(batch.ids)])
        for row in wanted[low:high].tolist():
            index = row - batch.row_start
            chosen.ids.append(batch.ids[index])
            chosen.contents.append(batch.contents[index])
            chosen.overrides.append(batch.overrides[index])
            chosen.tenants.append(batch.tenants[index])
    return chosen
