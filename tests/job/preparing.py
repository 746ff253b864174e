"""Which rows are read and tokenised, and a call that is cut off meanwhile."""

from __future__ import annotations

import pytest

from pipeline.job.prepare import Preparation
from pipeline.job.prepared_batch import PreparedBatch
from pipeline.prompts import PromptBatch


def watch_prepared(patch: pytest.MonkeyPatch) -> list[int]:
    """First rows of the batches that are prepared from now on."""
    return fail_after(patch, -1, KeyboardInterrupt())


def fail_after(patch: pytest.MonkeyPatch, batches: int, error: BaseException) -> list[int]:
    """As `watch_prepared`; the call after so many batches raises."""
    prepared: list[int] = []
    whole = Preparation.prepare

    def prepare(self: Preparation, batch: PromptBatch) -> PreparedBatch:
        if len(prepared) == batches:
            raise error
        prepared.append(batch.row_start)
        return whole(self, batch)

    patch.setattr(Preparation, "prepare", prepare)
    return prepared
