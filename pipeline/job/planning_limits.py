"""What rows must keep to, to be planned, and what planning and KV may take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, ModelError
from pipeline.job.job import Job
from pipeline.plan.plan import Plan
from pipeline.plan.shards import cut_into_shards
from pipeline.plan.subplan import only
from pipeline.plan.summary import KVLimits
from pipeline.records import SamplingParams
from pipeline.settings import PlanSettings

_ROW_BYTES = 250  # of the plan's own columns while it is built, measured
_SORT_COST = 2.0  # bytes of memory for each byte that is sorted, measured
_LEAST_SORT_BYTES = 64 << 20
_BASE_BYTES = 600 << 20  # Python with its libraries
_MOST_SAMPLES = 100_000_000  # of all rows: planned, each takes some 60 bytes


def check_vocabulary(largest: int, job: Job) -> None:
    """Raises ModelError where a token id is none of the model's."""
    if job.shape is not None and largest >= job.shape.vocabulary_size:
        raise ModelError(
            f"tokenizer and model do not belong together: token id {largest} appears, "
            f"but the model knows {job.shape.vocabulary_size} ids; check --model and --revision"
        )


def check_samples(
    params: Sequence[SamplingParams], params_of_row: NDArray[np.integer], runs: NDArray[np.bool_]
) -> None:
    """Raises InputError where rows that run ask for more samples than can be planned."""
    counts = np.array([p.n for p in params], np.int64)
    total = int(counts[params_of_row[runs]].sum())
    if total > _MOST_SAMPLES and counts.max() > 1:
        raise InputError(
            f"the rows ask for {total:,} samples together, and a job has {_MOST_SAMPLES:,} at "
            "most; lower n, or cut the input into several jobs"
        )


def sort_bytes(plan_memory: int, num_rows: int) -> int:
    """Bytes of token ids to sort at a time, so that planning stays below `plan_memory`.

    What the process holds besides is not asked: a model may be loading in another thread.
    """
    left = plan_memory - _BASE_BYTES - num_rows * _ROW_BYTES
    return max(_LEAST_SORT_BYTES, int(left / _SORT_COST))


def kv_limits(job: Job) -> KVLimits:
    """What bounds the KV memory of a job."""
    settings = job.settings
    per_token = None
    if job.shape is not None:
        per_token = job.shape.kv_bytes_per_token(settings.model.dtype)
    return KVLimits(per_token, settings.engine.max_rows, settings.engine.kv_budget)


def rows_of_shard(
    plan: Plan, first: NDArray[np.int64] | slice, settings: PlanSettings
) -> NDArray[np.int64]:
    """The rows of the shard that the settings name; `first`: of each row, the row of the plan's
    table that decides. Rows that cannot run are dealt out in turn.

    A row that is scored is whole in the shard of its first request: each shard writes rows of its
    own. Shards are cut from first requests alone: others of a row may lie elsewhere in the tree.
    """
    sequence_of_row = plan.sequence_of_row[first]
    rows = np.arange(len(sequence_of_row))
    if settings.num_shards == 1:
        return rows
    deciding = np.arange(len(plan.sequences))
    if plan.scores is not None:
        deciding = np.unique(sequence_of_row[sequence_of_row >= 0])
    shards = cut_into_shards(only(plan, deciding), settings.num_shards)
    is_ours = np.isin(sequence_of_row, deciding[shards[settings.shard_number].sequences])
    is_ours |= (sequence_of_row < 0) & (rows % settings.num_shards == settings.shard_number)
    return rows[is_ours]
