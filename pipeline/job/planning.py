"""From rows that are tokenised to the plan of a job. Touches no device and no output folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.constraints import schema_of
from pipeline.inputs.columns import ColumnMap
from pipeline.inputs.row_ids import refuse_duplicate_ids
from pipeline.job.conversations import Asked, Splits, build, plan_turns
from pipeline.job.document_ordering import OrderedRows, check_memory, order_documents
from pipeline.job.job import Job
from pipeline.job.noise_names import noise_names
from pipeline.job.planning_limits import (
    check_vocabulary,
    kv_limits,
    rows_of_shard,
    sort_bytes,
)
from pipeline.job.prepared_rows import PreparedRows
from pipeline.job.reading import Watch, ignore, read_rows
from pipeline.job.rejections import describe_rejected
from pipeline.narrowed_schemas import narrowed
from pipeline.plan.document_figures import DocumentFigures, count_figures
from pipeline.plan.document_rows import DocumentCounts, count_documents, with_documents
from pipeline.plan.frames import plan_frame
from pipeline.plan.plan import Plan
from pipeline.plan.requests import Requests
from pipeline.plan.samples import Samples
from pipeline.plan.score_planning import ScoreFigures, by_rows, with_scores
from pipeline.plan.segment_table import Segments
from pipeline.plan.summary import PlanSummary, summarise
from pipeline.prompts import Rejected
from pipeline.storage.schema import output_schema
from pipeline.storage.schema_types import JSON_TEXT, Form, form_of


@dataclass(frozen=True, eq=False)
class PlannedJob:
    """A job whose rows are known: row i of `plan.table` is input row i and has the id `ids[i]`.
    Where rows are scored, rows of the table are `requests`, of which a row has one or more.

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
    requests: Requests | None = None

    def table_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the plan's table that belong to these input rows."""
        return rows if self.requests is None else self.requests.of_rows(rows)

    def first_in_table(self, row: int) -> int:
        """The first row of the plan's table that belongs to an input row."""
        return row if self.requests is None else int(self.requests.first[row])

    def input_row(self, row: int) -> int:
        """The input row that a row of the plan's table belongs to."""
        return row if self.requests is None else int(self.requests.row[row])

    def prompt_tokens(self, row: int) -> int:
        """Of an input row, without the opening of its answer; of one that is scored, those of all
        its requests, each in full."""
        if self.requests is None:
            return int(self.plan.table.lengths[row]) - len(self.opening(row))
        return int(self._tokens_of_row[row])

    def opening(self, row: int) -> tuple[int, ...]:
        """Forced tokens that the answer of an input row begins with, and its prompt in the plan's
        table ends with."""
        sequence = -1 if self.requests is not None else int(self.plan.sequence_of_row[row])
        if sequence < 0:
            return ()
        return self.plan.params[int(self.plan.sequences.params[sequence])].opening

    @cached_property
    def parsed(self) -> Form | None:
        """How answers are kept that are JSON by their schemas: typed, where all rows have the same
        one; None: there are none."""
        asked, read = self.job.settings.sampling, self.job.settings.read
        found = {p.constraint for p in self.plan.params if schema_of(p.constraint) is not None}
        if asked.json_schema is None or self.requests is not None:
            return JSON_TEXT if found or read.json_schema_column is not None else None
        own = schema_of(asked.constraint)
        return form_of(narrowed(own)) if own and found <= {asked.constraint} else JSON_TEXT

    @cached_property
    def _tokens_of_row(self) -> NDArray[np.int64]:
        assert self.requests is not None
        return self.requests.totals(self.plan.table.lengths)

    def tenant(self, sequence: int) -> str:
        """What the KV of a sequence belongs to: the hash of its tenant, empty without one."""
        row = self.input_row(int(self.plan.sequences.row[sequence]))
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
        if self.requests is None:
            frame = plan_frame(self.plan, self.ids)
        else:
            frame = plan_frame(self.plan, self.ids.gather(self.requests.row))
            frame = by_rows(frame, self.requests)
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
        plan, rows = self.plan, self.table_rows(self.rows)
        total = int(plan.table.lengths[rows].sum())
        return total, plan.tokens_to_compute(self.samples.sequences(rows))

    @cached_property
    def samples(self) -> Samples:
        """Which sequences are a row's."""
        return Samples(self.plan)

    @cached_property
    def columns(self) -> ColumnMap:
        """Of the input, and what the output has besides. Raises InputError where names clash."""
        parsed = None if self.parsed is None else self.parsed.type
        columns = replace(
            self.job.source.columns,
            is_guided=parsed is not None or any(p.is_guided for p in self.plan.params),
            parsed=parsed,
            has_logprobs=any(p.logprobs is not None for p in self.plan.params),
            has_samples=self.samples.are_several,
            is_exploded=self.job.settings.write.explode,
        )
        output_schema(self.job.source.schema, columns)
        return columns

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
    _ = planned.columns  # InputError must come now, not when the first part is written
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


def _build(job: Job, rows: PreparedRows) -> PlannedJob:
    table, columns, params = rows.tokens(), rows.columns(), rows.params()
    check_vocabulary(rows.largest_id, job)
    ids = columns["id"]
    refuse_duplicate_ids(ids)
    settings = job.settings.plan
    segments = rows.segments() if job.source.columns.has_segments else None
    requests = rows.requests() if job.source.columns.has_scores else None
    of_table = slice(None) if requests is None else requests.row
    tenant, params_of_row = (columns[name].to_numpy() for name in ("tenant", "params"))
    ordered = None
    if segments is not None and job.settings.reuse.document_order == "best":
        check_memory(segments, settings.plan_memory)
        ordered = order_documents(table, segments, tenant)
        table, segments = ordered.table, ordered.segments
    rejected, turns, by_prefix = rows.rejected(), job.source.turns, None
    splits = Splits(
        noise_names(job.source.columns, ids, table),
        tenant[of_table],
        settings.min_prefix_tokens,
        sort_bytes(settings.plan_memory, len(table)),
    )
    asked = Asked(table, params, params_of_row[of_table], rows.system_tokens())
    if turns is not None and job.eviction is not None:
        plan, rejected = plan_turns(asked, turns, rejected, job.eviction, splits)
    else:
        kinds = None if job.reuse is None or segments is None else segments.kinds()
        plan = build(asked, splits, table, kinds)
    if requests is not None:
        plan = with_scores(plan, requests)
    if job.reuse is not None and segments is not None:
        by_prefix = plan
        plan = with_documents(plan, segments, job.reuse, tenant)
    named = ids if requests is None else ids.gather(requests.row)
    summary, figures = _describe(job, plan, named, segments, job.settings.reuse.reuse)
    summary = replace(summary, rejections=describe_rejected(rejected, ids))
    if requests is not None:
        scores = ScoreFigures.of(plan, requests).to_json() | job.question_figures
        summary = replace(summary, rows=len(ids), rows_rejected=len(rejected), scores=scores)
    first = slice(None) if requests is None else requests.first
    return PlannedJob(
        job,
        plan,
        ids,
        rejected,
        rows_of_shard(plan, first, settings),
        summary,
        tenant,
        rows.tenants(),
        segments,
        figures,
        ordered,
        by_prefix,
        requests=requests,
    )


def _describe(
    job: Job, plan: Plan, ids: pl.Series, segments: Segments | None, mode: str
) -> tuple[PlanSummary, DocumentFigures | None]:
    """Of a plan whose documents are reused by `mode`."""
    limits = kv_limits(job)
    summary = summarise(plan, ids, limits)
    if segments is None:
        return summary, None
    figures = count_figures(plan, segments, mode, limits.bytes_per_token)
    return replace(summary, documents=figures.to_json()), figures
