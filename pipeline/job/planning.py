"""From an input file to a plan: read, tokenise, plan. Touches no device and no output folder.

```
 reader thread ──► channel ──► tokenise a batch ──► token table, parameters, rejected rows ──► plan
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, ModelError
from pipeline.job.channel import Stages
from pipeline.job.prepare import Limits, Preparation
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.summary import KVLimits, PlanSummary, summarise
from pipeline.plan.token_table import TokenTable, narrowest_dtype
from pipeline.records import PromptBatch, Rejected, SamplingParams
from pipeline.settings import JobSettings, ModelSettings
from pipeline.storage.reader import PromptSource, find_duplicate_ids, open_source
from pipeline.storage.schema import output_schema
from pipeline.tokens.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from pipeline.engine.model import ModelShape

_BATCHES_AHEAD = 4
_SAID = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")


@dataclass(frozen=True, eq=False)
class Job:
    """An opened job: input, tokenizer and the model's shape (None only for the echo engine)."""

    settings: JobSettings
    source: PromptSource
    tokenizer: PromptTokenizer
    shape: ModelShape | None

    @property
    def generation_config(self) -> dict[str, Any]:
        """Generation defaults of the model's repository."""
        return {} if self.shape is None else self.shape.generation_config

    def describe_generation(self) -> str:
        """Those defaults in one line for a person."""
        said = {name: value for name, value in self.generation_config.items() if name in _SAID}
        shown = ", ".join(f"{name}={value}" for name, value in said.items())
        return f"generation defaults of the model: {shown or 'none'}"

    def preparation(self) -> Preparation:
        """The rules by which this job's rows become token ids and parameters."""
        context = None if self.shape is None else self.shape.context_length
        limits = Limits(context, self.settings.plan.on_overlong)
        return Preparation(self.tokenizer, self.settings.sampling, self.generation_config, limits)


@dataclass(frozen=True, eq=False)
class PlannedJob:
    """A job whose rows are known: row i of `plan.table` is input row i and has the id `ids[i]`."""

    job: Job
    plan: Plan
    ids: list[str]
    rejected: dict[int, Rejected]
    summary: PlanSummary


def open_job(input: str, settings: JobSettings) -> Job:
    """Open input, tokenizer and model config. Raises InputError, ModelError, UsageError."""
    source = open_source(input, settings.read)
    output_schema(source.schema, source.columns.id)  # refuses names that would collide
    model = settings.model
    tokenizer = PromptTokenizer.load(model.model, model.revision, settings.tokens)
    return Job(settings, source, tokenizer, _read_shape(model))


def _read_shape(settings: ModelSettings) -> ModelShape | None:
    folder = Path(settings.model)
    if settings.engine == "echo" and folder.is_dir() and not (folder / "config.json").exists():
        return None
    from pipeline.engine.model import read_shape

    return read_shape(settings.model, settings.revision)


def plan_rows(job: Job) -> PlannedJob:
    """Read, tokenise and plan every row. Raises InputError for duplicate ids and damaged pages."""
    rows = _Rows(job)
    with Stages() as stages:
        batches = stages.channel(_BATCHES_AHEAD)

        def read() -> None:
            for batch in job.source.iter_prompts():
                batches.put(batch)
            batches.finish()
            job.source.check_carried_columns()  # damage there must show before the device is used

        stages.start("reader", read)
        for batch in batches:
            rows.add(batch)
    duplicates = find_duplicate_ids(rows.ids)
    if duplicates:
        raise InputError(
            f"ids must be unique, but these come twice: {', '.join(duplicates)}; "
            "make them unique or choose another column with --id-column"
        )
    return rows.plan()


class _Rows:
    """The rows read so far, column by column."""

    def __init__(self, job: Job) -> None:
        self.ids: list[str] = []
        self._job = job
        self._preparation = job.preparation()
        self._dtype = narrowest_dtype(job.tokenizer.vocabulary_size)
        self._batches: list[tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]] = []
        self._rejected: dict[int, Rejected] = {}
        self._params: dict[SamplingParams, int] = {}
        self._params_of_row: list[int] = []
        self._tenants: dict[str | None, int] = {}
        self._tenant_of_row: list[int] = []

    def add(self, batch: PromptBatch) -> None:
        """Tokenise a batch and keep what the plan needs of it."""
        prepared = self._preparation.prepare(batch)
        self._rejected |= prepared.rejected
        self._batches.append((prepared.flat.astype(self._dtype), prepared.lengths))
        self.ids.extend(batch.ids)
        for tenant in batch.tenants:
            self._tenant_of_row.append(self._tenants.setdefault(tenant, len(self._tenants)))
        for params in prepared.params:
            self._params_of_row.append(self._params.setdefault(params, len(self._params)))

    def plan(self) -> PlannedJob:
        """Build the plan of all rows read."""
        job = self._job
        table = TokenTable.from_batches(self._batches, self._dtype)
        _check_vocabulary(table, job)
        plan = build_plan(
            table,
            self.ids,
            tuple(self._params),
            np.array(self._params_of_row, np.int64),
            np.array(self._tenant_of_row, np.int64),
            job.settings.plan.min_prefix_tokens,
        )
        summary = summarise(plan, self.ids, _kv_limits(job))
        return PlannedJob(job, plan, self.ids, self._rejected, summary)


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


def _check_vocabulary(table: TokenTable, job: Job) -> None:
    if job.shape is None or not len(table.flat):
        return
    largest = int(table.flat.max())
    if largest >= job.shape.vocabulary_size:
        raise ModelError(
            f"tokenizer and model do not belong together: token id {largest} appears, "
            f"but the model knows {job.shape.vocabulary_size} ids; check --model and --revision"
        )


def _kv_limits(job: Job) -> KVLimits:
    settings = job.settings
    per_token = None
    if job.shape is not None:
        per_token = job.shape.kv_bytes_per_token(settings.model.dtype)
    return KVLimits(per_token, settings.engine.max_rows, settings.engine.kv_budget)
