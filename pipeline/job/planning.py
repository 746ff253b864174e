"""From an input file to a plan: read, tokenise, plan. Touches no device and no output folder.

```
 reader thread ──► channel ──► tokenise a batch ──► token file, parameters, rejected rows ──► plan
                                                       └── checkpoint, where there are many rows
```
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.errors import InputError, ModelError
from pipeline.inputs.prompt_source import find_duplicate_ids
from pipeline.job.advice import SAMPLE_CHARACTERS, SAMPLE_ROWS, advise
from pipeline.job.channel import Stages
from pipeline.job.field_ordering import memory_needed, order_fields
from pipeline.job.job import Job
from pipeline.job.noise_names import noise_names
from pipeline.job.observer import Planning
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.job.prepared_rows import PreparedRows
from pipeline.job.rejections import describe_rejected
from pipeline.job.row_faults import call_by_halves
from pipeline.model.rates import recall_rates
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.shards import cut_into_shards
from pipeline.plan.summary import KVLimits, PlanSummary, plan_frame, summarise
from pipeline.plan.token_table import narrowest_dtype
from pipeline.records import PromptBatch, Rejected
from pipeline.settings import PlanSettings

_BATCHES_AHEAD = 4
_ROW_BYTES = 250  # of the plan's own columns while it is built, measured
_SORT_COST = 2.0  # bytes of memory for each byte that is sorted, measured
_LEAST_SORT_BYTES = 64 << 20
_BASE_BYTES = 600 << 20  # Python with its libraries


Watch = Callable[[Planning], None]


def ignore(planning: Planning) -> None:
    """Nobody watches."""


@dataclass(frozen=True, eq=False)
class PlannedJob:
    """A job whose rows are known: row i of `plan.table` is input row i and has the id `ids[i]`.

    `rows`: ascending, those that this job answers; the others belong to other shards.
    `tenant_of_row`: [rows] int32, index into `tenants`.
    """

    job: Job
    plan: Plan
    ids: pl.Series
    rejected: dict[int, Rejected]
    rows: NDArray[np.int64]
    summary: PlanSummary
    tenant_of_row: NDArray[np.int32]
    tenants: tuple[str | None, ...]

    def tenant(self, sequence: int) -> str:
        """What the KV of a sequence belongs to: the hash of its tenant, empty without one."""
        row = int(self.plan.sequences.row[sequence])
        return self.tenants[int(self.tenant_of_row[row])] or ""

    def group_id(self, node: int) -> int:
        """How rows name a group: its node, or where there are tenants a number made of it.

        Nodes are counted through all tenants' trees, and no tenant may learn how large others are.
        """
        if self.job.source.columns.tenant is None:
            return node
        digest = hashlib.blake2b(f"{self.summary.plan_hash}:{node}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "big") >> 1

    def frame(self) -> pl.DataFrame:
        """`plan.parquet` of all rows: `plan_frame`, with groups named as rows name them."""
        frame = plan_frame(self.plan, self.ids)
        if self.job.source.columns.tenant is None:
            return frame
        nodes = frame["group_id"].drop_nulls().unique().to_list()
        names = {node: self.group_id(node) for node in nodes}
        return frame.with_columns(pl.col("group_id").replace(names))

    def count_tokens(self) -> tuple[int, int]:
        """(prompt tokens T, unique tokens U) of this job's rows."""
        plan, runs = self.plan, self.plan.sequence_of_row[self.rows]
        is_needed = plan.count_below(np.unique(runs[runs >= 0])) > 0
        total = int(plan.table.lengths[self.rows].sum())
        return total, int(plan.tree.edge_lengths[is_needed].sum())


def plan_rows(job: Job, keep_rows: bool = False, watch: Watch = ignore) -> PlannedJob:
    """Read, tokenise and plan every row. Raises InputError for duplicate ids and damaged pages.

    `keep_rows`: leave what was tokenised, of a large input, to the next call for the same job.
    `watch` is told how far it is; what that raises ends it.
    """
    rows = read_rows(job, watch)
    with rows.until_failure():
        planned = _build(job, rows)
    rows.keep() if keep_rows else rows.forget()
    return planned


def plan_for_a_person(job: Job, keep_rows: bool = False, watch: Watch = ignore) -> PlannedJob:
    """As `plan_rows`, with what a person wants to know before a run: advice and estimated time."""
    planned = plan_rows(job, keep_rows, watch)
    prompts = sample_prompts(planned)
    summary, advice = planned.summary, advise(prompts)
    fields, memory = job.fields, job.settings.plan.plan_memory
    if fields is None and job.source.fields and memory_needed(job.source) <= memory:
        _, fields = order_fields(job.source, memory, is_applied=False)
    rates = None if job.shape is None else recall_rates(job.settings.model, job.model_identity)
    summary = replace(
        summary,
        advice=None if advice is None else advice.to_json(),
        warning=job.tokenizer.looks_rendered(prompts),
        fields=None if fields is None else fields.to_json(),
        estimate=None
        if rates is None
        else rates.estimate(summary.unique_tokens, summary.max_new_tokens),
    )
    return replace(planned, summary=summary)


def warn_of(planned: PlannedJob) -> list[str]:
    """What a person should know of a few prompts before a run: a sentence, or nothing."""
    warning = planned.job.tokenizer.looks_rendered(sample_prompts(planned, 64, 64))
    return [warning] if warning else []


def sample_prompts(
    planned: PlannedJob, num_rows: int = SAMPLE_ROWS, num_tokens: int = SAMPLE_CHARACTERS
) -> list[str]:
    """Beginnings of some prompts, evenly spaced, as their token ids spell them."""
    table = planned.plan.table
    rows = range(0, len(table), max(1, -(-len(table) // num_rows)))
    ids = [table[row][:num_tokens].tolist() for row in rows if table.lengths[row]]
    decoded = call_by_halves(planned.job.tokenizer.decode_batch, ids)
    return [
        text[:SAMPLE_CHARACTERS]
        for _, texts in decoded
        if not isinstance(texts, BaseException)  # of which no advice is given
        for text in texts
    ]


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
        for batch in batches:
            rows.add(batch)
            watch(Planning(total, rows.num_rows, before, time.monotonic() - started))
        rows.save()
    return rows


def _build(job: Job, rows: PreparedRows) -> PlannedJob:
    table, columns, params = rows.tokens(), rows.columns(), rows.params()
    _check_vocabulary(rows.largest_id, job)
    ids = columns["id"]
    _check_ids(ids)
    settings = job.settings.plan
    plan = build_plan(
        table,
        noise_names(job.source.columns, ids, table),
        params,
        columns["params"].to_numpy(),
        columns["tenant"].to_numpy(),
        settings.min_prefix_tokens,
        _sort_bytes(settings.plan_memory, len(table)),
    )
    rejected = rows.rejected()
    summary = replace(
        summarise(plan, ids, _kv_limits(job)), rejections=describe_rejected(rejected, ids)
    )
    return PlannedJob(
        job,
        plan,
        ids,
        rejected,
        _rows_of_shard(plan, settings),
        summary,
        columns["tenant"].to_numpy(),
        rows.tenants(),
    )


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


def _rows_of_shard(plan: Plan, settings: PlanSettings) -> NDArray[np.int64]:
    """Rows that cannot run are dealt out in turn."""
    rows = np.arange(len(plan.table))
    if settings.num_shards == 1:
        return rows
    shard = cut_into_shards(plan, settings.num_shards)[settings.shard_number]
    is_ours = np.isin(plan.sequence_of_row, shard.sequences)
    is_ours |= (plan.sequence_of_row < 0) & (rows % settings.num_shards == settings.shard_number)
    return rows[is_ours]


def _check_ids(ids: pl.Series) -> None:
    duplicates = find_duplicate_ids(ids)
    if duplicates:
        raise InputError(
            f"ids must be unique, but these come twice: {', '.join(duplicates)}; "
            "make them unique or choose another column with --id-column"
        )


def _check_vocabulary(largest: int, job: Job) -> None:
    if job.shape is not None and largest >= job.shape.vocabulary_size:
        raise ModelError(
            f"tokenizer and model do not belong together: token id {largest} appears, "
            f"but the model knows {job.shape.vocabulary_size} ids; check --model and --revision"
        )


def _sort_bytes(plan_memory: int, num_rows: int) -> int:
    """Bytes of token ids to sort at a time, so that planning stays below `plan_memory`.

    What the process holds besides is not asked: a model may be loading in another thread.
    """
    left = plan_memory - _BASE_BYTES - num_rows * _ROW_BYTES
    return max(_LEAST_SORT_BYTES, int(left / _SORT_COST))


def _kv_limits(job: Job) -> KVLimits:
    settings = job.settings
    per_token = None
    if job.shape is not None:
        per_token = job.shape.kv_bytes_per_token(settings.model.dtype)
    return KVLimits(per_token, settings.engine.max_rows, settings.engine.kv_budget)
