"""The numbers of a run, from its manifest, plan, audit and rows. Draws nothing, writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from pipeline.costs import (
    NO_COSTS,
    Cost,
    CostSettings,
    cost_of_run,
    price_of,
    saved_seconds,
)
from pipeline.report.bins import DepthBin, SizeBin, measure_depths, measure_group_sizes
from pipeline.report.conversations import ConversationHealth, measure_conversations
from pipeline.report.documents import DocumentTokens, measure_documents
from pipeline.report.groups import GroupTable, measure_groups
from pipeline.report.scores import ScoreHealth, measure_scores
from pipeline.report.trend import Night, night_before, ratio

_MAX_FAILURES: Final = 20
_MAX_DIFFERENCES: Final = 500
_MAX_REASONS: Final = 12
AUDIT_COLUMNS: Final = (
    "id", "row_index", "group_id", "reuse_depth",
    "audit_exact", "audit_class", "audit_first_divergence", "audit_margin",
)  # fmt: skip
"""What is shown of `audit/audit.parquet`."""
_SEVERITY: Final = {"near_tie": 1, "drift": 2, "corrupt": 3}


@dataclass(frozen=True)
class Accuracy:
    """How many rows of a task gave exactly the known answer; a failed row did not."""

    task: str
    rows: int
    right: int

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.right / self.rows


@dataclass(frozen=True)
class Failure:
    """A row without an answer."""

    id: str
    error_type: str
    message: str


@dataclass(frozen=True)
class Difference:
    """An audited row whose answer the baseline would not have given.

    `position`: of the first token that differs; `margin`: between the baseline's two best there,
    None where the answer only ends wrongly.
    """

    id: str
    row_class: str
    position: int
    margin: float | None
    group_id: int | None
    reuse_depth: int | None


@dataclass(frozen=True)
class RunMetrics:
    """All that the report shows. Counts sum over sessions; a number that nobody measured is None.

    `manifest`, `plan` and `audit` are the JSON files as read, the last two None where missing;
    `failure_types`: (type, rows), the most frequent first; `finish_reasons` likewise, of answered
    rows.
    """

    manifest: dict[str, Any]
    plan: dict[str, Any] | None
    audit: dict[str, Any] | None
    depths: tuple[DepthBin, ...]
    group_sizes: tuple[SizeBin, ...]
    accuracy: tuple[Accuracy, ...]
    failures: tuple[Failure, ...]
    failure_types: tuple[tuple[str, int], ...] = ()
    finish_reasons: tuple[tuple[str, int], ...] = ()
    differences: tuple[Difference, ...] = ()
    groups: GroupTable = GroupTable()
    trend: tuple[Night, ...] = ()
    documents: DocumentTokens | None = None
    conversations: ConversationHealth | None = None
    scores: ScoreHealth | None = None
    price: CostSettings = NO_COSTS

    def counter(self, name: str) -> float:
        """A counter of run.json; 0 before the first session has ended."""
        return float(self.manifest.get("counters", {}).get(name, 0))

    def measured(self, name: str) -> float | None:
        """A counter of run.json; None before the first session has ended."""
        return self.counter(name) if name in self.manifest.get("counters", {}) else None

    @property
    def saved_share(self) -> float | None:
        """Measured: prompt tokens taken from the cache, out of all that rows needed."""
        cached = self.counter("cached_tokens")
        return ratio(cached, cached + self.counter("prefilled_tokens"))

    @property
    def saved_s(self) -> float | None:
        """Seconds that the cached tokens would have taken at the measured rate of prefill."""
        return saved_seconds(self.manifest.get("counters", {}))

    @property
    def cost(self) -> Cost | None:
        """Of all sessions; None where nobody said what an hour costs."""
        return cost_of_run(price_of(self.manifest, self.price), self.manifest.get("counters", {}))

    @property
    def ended_shares(self) -> tuple[tuple[str, int, float], ...]:
        """(finish reason, rows, share of the answered rows)."""
        total = sum(rows for _, rows in self.finish_reasons)
        return tuple((name, rows, rows / total) for name, rows in self.finish_reasons)

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens by wall time."""
        return ratio(self.counter("generated_tokens"), self.counter("wall_s"))

    @property
    def busy_share(self) -> float | None:
        """How much of the time between first and last forward pass the device computed."""
        return ratio(self.counter("busy_s"), self.counter("span_s"))

    @property
    def kv_budget_bytes(self) -> int | None:
        """The limit that the run was given, or the one the plan found."""
        asked = self.manifest.get("settings", {}).get("engine", {}).get("kv_budget")
        return asked or (self.plan or {}).get("kv_budget_bytes")

    @property
    def night_before(self) -> Night | None:
        """The last earlier night of the same job that has numbers."""
        return night_before(self.trend)

    @property
    def num_correct(self) -> tuple[int, int] | None:
        """(right, rows) over all tasks; None where the input knows no answers."""
        if not self.accuracy:
            return None
        return sum(a.right for a in self.accuracy), sum(a.rows for a in self.accuracy)


def measure(
    manifest: dict[str, Any],
    plan: dict[str, Any] | None,
    audit: dict[str, Any] | None,
    output: pl.LazyFrame,
    audited: pl.DataFrame | None = None,
    tree: pl.DataFrame | None = None,
    trend: tuple[Night, ...] = (),
    price: CostSettings = NO_COSTS,
) -> RunMetrics:
    """Gather everything. `output` has the output columns; it is scanned, never loaded whole.

    `audited`: the rows of `audit/audit.parquet`; `tree`: of `plan/tree.parquet`; `price`: over the
    one that the run recorded.
    """
    return RunMetrics(
        manifest=manifest,
        plan=plan,
        audit=audit,
        depths=measure_depths(output),
        group_sizes=measure_group_sizes(output),
        accuracy=measure_accuracy(output),
        failures=list_failures(output),
        failure_types=_count(output.filter(pl.col("status") == "error"), "error_type"),
        finish_reasons=count_finish_reasons(output),
        groups=measure_groups(output, tree, audited),
        trend=trend,
        price=price,
        documents=measure_documents(output) if plan and plan.get("documents") else None,
        conversations=measure_conversations(output, manifest.get("settings", {})),
        scores=measure_scores(output, manifest),
        differences=() if audited is None else list_differences(audited),
    )


def measure_accuracy(output: pl.LazyFrame) -> tuple[Accuracy, ...]:
    """Exact match with the input's `answer` after stripping, by `task` if there is one.

    Rows whose answer is null are left out. Empty where the input has no such column.
    """
    schema = output.collect_schema()
    if "answer" not in schema or schema["answer"].is_nested():
        return ()
    known = output.filter(pl.col("answer").is_not_null())
    answer = pl.col("answer").cast(pl.String).str.strip_chars()
    right = (pl.col("generated_text").str.strip_chars() == answer).fill_null(False)
    has_tasks = "task" in schema and not schema["task"].is_nested()
    task = pl.col("task").cast(pl.String).fill_null("no task") if has_tasks else pl.lit("all")
    counts = known.group_by(task=task).agg(pl.len().alias("rows"), right.sum().alias("right"))
    return tuple(Accuracy(*row) for row in counts.sort("task").collect().iter_rows())


def list_failures(output: pl.LazyFrame) -> tuple[Failure, ...]:
    """The first failed rows, in input order."""
    failed = output.filter(pl.col("status") == "error").sort("row_index").head(_MAX_FAILURES)
    columns = ("id", "error_type", "error_message")
    rows = failed.select(pl.col(column).fill_null("") for column in columns).collect()
    return tuple(Failure(*row) for row in rows.iter_rows())


def count_finish_reasons(output: pl.LazyFrame) -> tuple[tuple[str, int], ...]:
    """(finish reason, rows) of the answered rows, the most frequent first."""
    return _count(output.filter(pl.col("status") == "ok"), "finish_reason")


def _count(rows: pl.LazyFrame, column: str) -> tuple[tuple[str, int], ...]:
    kind = pl.col(column).cast(pl.String).fill_null("")
    counts = rows.group_by(kind).agg(rows=pl.len()).sort("rows", column, descending=[True, False])
    return tuple(counts.head(_MAX_REASONS).collect().iter_rows())


def list_differences(audited: pl.DataFrame) -> tuple[Difference, ...]:
    """The first audited rows that are not identical, the worst classes first."""
    worst = pl.col("audit_class").replace_strict(_SEVERITY, default=0)
    differing = audited.filter(~pl.col("audit_exact")).sort(worst, "row_index", descending=True)
    found = ("audit_class", "audit_first_divergence", "audit_margin")
    columns = ("id", *found, "group_id", "reuse_depth")
    rows = differing.select(columns).head(_MAX_DIFFERENCES)
    return tuple(Difference(*row) for row in rows.iter_rows())
