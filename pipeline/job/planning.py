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
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.errors import InputError, ModelError
from pipeline.inputs.prompt_source import find_duplicate_ids
from pipeline.job.channel import Stages
from pipeline.job.document_ordering import OrderedRows, check_memory, order_documents
from pipeline.job.job import Job
from pipeline.job.noise_names import noise_names
from pipeline.job.observer import Planning
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.job.prepared_rows import PreparedRows
from pipeline.job.rejections import describe_rejected
from pipeline.plan.document_figures import DocumentFigures, count_figures
from pipeline.plan.document_rows import DocumentCounts, count_documents, with_documents
from pipeline.plan.frames import plan_frame
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.segment_table import Segments
from pipeline.plan.shards import cut_into_shards
from pipeline.plan.summary import KVLimits, PlanSummary, summarise
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
    `tenant_of_row`: [rows] int32, index into `tenants`. `segments`: how rows are cut, None where
    they are in one piece; `figures` of their documents; `ordered`: None where these stand as they
    were given; `by_prefix`: the plan without its documents, where it has some; `fallback_reason`:
    why they are not reused as was asked.
    """

    job: Job
    plan: Plan
    ids: pl.Series
    rejected: dict[int, Rejected]
    rows: NDArray[np.int64]
    summary: PlanSummary
    tenant_of_row: NDArray[np.int32]
    tenants: tuple[str | None, ...]
    segments: Segments | None = None
    figures: DocumentFigures | None = None
    ordered: OrderedRows | None = None
    by_prefix: Plan | None = None
    fallback_reason: str | None = None

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
        if self.ordered is not None:
            order = self.ordered.numbers().gather(frame["row_index"])
            frame = frame.with_columns(order.alias("document_order"))
        if self.job.source.columns.tenant is None:
            return frame
        nodes = frame["group_id"].drop_nulls().unique().to_list()
        names = {node: self.group_id(node) for node in nodes}
        return frame.with_columns(pl.col("group_id").replace(names))

    def count_tokens(self) -> tuple[int, int]:
        """(prompt tokens T, unique tokens U) of this job's rows."""
        plan, runs = self.plan, self.plan.sequence_of_row[self.rows]
        total = int(plan.table.lengths[self.rows].sum())
        return total, plan.tokens_to_compute(np.unique(runs[runs >= 0]))

    @cached_property
    def counts(self) -> DocumentCounts | None:
        """Of each row, where prompts are in segments."""
        return None if self.segments is None else count_documents(self.plan, self.segments)

    def count_added(self) -> int:
        """Tokens that rows need beside their prompts: soft ones, and those that are stored and
        computed again all the same."""
        if self.counts is None:
            return 0
        rows = self.plan.sequences.row
        return int(self.counts.repaired_tokens[rows].sum() + self.counts.soft_tokens[rows].sum())


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


def without_documents(planned: PlannedJob, reason: str) -> PlannedJob:
    """The same job, whose whole prompts are computed after all."""
    plan = planned.by_prefix
    assert plan is not None
    summary, figures = _describe(planned.job, plan, planned.ids, planned.segments, "prefix")
    return replace(
        planned,
        plan=plan,
        summary=replace(summary, rejections=planned.summary.rejections),
        figures=figures,
        by_prefix=None,
        fallback_reason=reason,
    )


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
    segments = rows.segments() if job.source.columns.has_segments else None
    tenant = columns["tenant"].to_numpy()
    ordered = None
    if segments is not None and job.settings.reuse.document_order == "best":
        check_memory(segments, settings.plan_memory)
        ordered = order_documents(table, segments, tenant)
        table, segments = ordered.table, ordered.segments
    plan = build_plan(
        table,
        noise_names(job.source.columns, ids, table),
        params,
        columns["params"].to_numpy(),
        tenant,
        settings.min_prefix_tokens,
        _sort_bytes(settings.plan_memory, len(table)),
        None if job.reuse is None else segments,
    )
    by_prefix = None
    if job.reuse is not None and segments is not None:
        by_prefix = plan
        plan = with_documents(plan, segments, job.reuse, tenant)
    rejected = rows.rejected()
    summary, figures = _describe(job, plan, ids, segments, job.settings.reuse.reuse)
    summary = replace(summary, rejections=describe_rejected(rejected, ids))
    return PlannedJob(
        job,
        plan,
        ids,
        rejected,
        _rows_of_shard(plan, settings),
        summary,
        tenant,
        rows.tenants(),
        segments,
        figures,
        ordered,
        by_prefix,
    )


def _describe(
    job: Job, plan: Plan, ids: pl.Series, segments: Segments | None, mode: str
) -> tuple[PlanSummary, DocumentFigures | None]:
    """Of a plan whose documents are reused by `mode`."""
    limits = _kv_limits(job)
    summary = summarise(plan, ids, limits)
    if segments is None:
        return summary, None
    figures = count_figures(plan, segments, mode, limits.bytes_per_token)
    return replace(summary, documents=figures.to_json()), figures


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
