"""What became of a job: counters of a finished one, and rows that are on the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from pipeline.costs import NO_COSTS, Cost, CostSettings, cost_of_run, price_of
from pipeline.errors import TooManyDegenerate, TooManyFailedRows
from pipeline.job.planning import PlannedJob
from pipeline.settings import JobSettings, WriteSettings
from pipeline.storage.manifest import notes_of
from pipeline.storage.run_directory import RunDirectory

_SUMMED = (
    "prefilled_tokens", "loaded_tokens", "generated_tokens", "forced_tokens",
    "wall_s", "prefill_s", "decode_s", "load_s", "busy_s", "span_s",
    "saved_conversations", "repeated_conversations",
)  # fmt: skip


@dataclass(frozen=True)
class RunOutcome:
    """A finished job. `was_complete`: there was nothing left to do.

    `reasons`: failed rows by the type of their error, the most frequent first; `notes`: what else
    one should know of it.
    """

    directory: str
    counters: dict[str, float]
    was_complete: bool = False
    reasons: dict[str, int] = field(default_factory=dict)
    price: CostSettings = NO_COSTS
    notes: tuple[str, ...] = ()

    @property
    def rows_failed(self) -> int:
        """Rows written with `status = error`."""
        return int(self.counters["rows_error"])

    @property
    def cost(self) -> Cost | None:
        """Of all its sessions; None where nobody said what an hour costs."""
        return cost_of_run(self.price, self.counters)

    def to_json(self) -> dict[str, Any]:
        """As `coppice run --json` says it."""
        counters = self.counters
        return {
            "directory": self.directory,
            "was_complete": self.was_complete,
            "rows": int(counters["rows_in"]),
            "rows_ok": int(counters["rows_ok"]),
            "rows_failed": self.rows_failed,
            "reasons": self.reasons,
            "counters": counters,
            "notes": list(self.notes),
            **({} if self.cost is None else {"cost": self.cost.to_json()}),
        }

    def check(self, settings: JobSettings) -> None:
        """Raises TooManyFailedRows or TooManyDegenerate where more rows failed, or answers repeat
        themselves, than the settings allow."""
        remedy = f"failed.parquet in {self.directory} names them"
        rows = int(self.counters["rows_in"])
        check_failures(settings.write, rows, self.reasons, remedy)
        check_degenerate(
            settings.conversations.max_degenerate,
            int(self.counters["rows_ok"]),
            int(self.counters.get("rows_degenerate", 0)),
        )

    @classmethod
    def of_sealed(cls, directory: RunDirectory, price: CostSettings = NO_COSTS) -> RunOutcome:
        """What a complete run directory has to say; `price`: over the one that it recorded."""
        answered, failed = directory.count_rows()  # what is there, whatever run.json says
        rows = {"rows_ok": answered, "rows_error": failed, "rows_in": answered + failed}
        manifest = directory.read_manifest()
        counters, notes = manifest["counters"] | rows, tuple(notes_of(manifest))
        reasons, price = count_reasons(directory), price_of(manifest, price)
        return cls(directory.name, counters, True, reasons, price, notes)


def check_failures(
    settings: WriteSettings, rows: int, reasons: Mapping[str, int], remedy: str
) -> None:
    """Raises TooManyFailedRows if more of the rows failed than the settings allow.

    `reasons`: failed rows by the type of their error.
    """
    failed, allowed = sum(reasons.values()), settings.allowed_failures(rows)
    if failed > allowed:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in reasons.items())
        raise TooManyFailedRows(
            f"{failed} of {rows} rows failed ({listed}); "
            f"--fail-on-error {settings.fail_on_error} allows {allowed}; {remedy}"
        )


def check_degenerate(allowed: float | None, turns: int, degenerate: int) -> None:
    """Raises TooManyDegenerate where more than this share of the answered turns repeat themselves
    or the turn before; None: any may."""
    if allowed is not None and degenerate > allowed * turns:
        raise TooManyDegenerate(
            f"{degenerate} of {turns} turns repeat themselves or the answer before; "
            f"--max-degenerate {allowed:g} allows {int(allowed * turns)}; see in the report where "
            "they lie, and choose another --evict or a larger --budget-tokens"
        )


def count_job(
    planned: PlannedJob, directory: RunDirectory, sessions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The counters of a job after these sessions, by what lies on the disk now."""
    sums = _sum_sessions(sessions) | _count_committed(directory)
    sums["rows_in"] = len(planned.rows)
    sums["prompt_tokens"], sums["unique_tokens"] = planned.count_tokens()
    if planned.plan.conversations is not None:
        sums["prompt_tokens"] = _count_prompt_tokens(directory)  # with their histories
    return sums


def _sum_sessions(sessions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the sessions of a job have counted, together; of older ones, what they counted."""
    sums: dict[str, float] = {name: sum(s.get(name, 0) for s in sessions) for name in _SUMMED}
    sums["peak_kv_bytes"] = max(s.get("peak_kv_bytes", 0) for s in sessions)
    return sums


def count_reasons(directory: RunDirectory) -> dict[str, int]:
    """Failed rows of the committed parts by the type of their error, the most frequent first."""
    failed = directory.scan().filter(pl.col("status") == "error")
    kinds = failed.group_by("error_type").agg(rows=pl.len()).collect()
    ordered = kinds.sort("rows", "error_type", descending=[True, False])
    return {str(kind): int(rows) for kind, rows in ordered.iter_rows()}


def _count_committed(directory: RunDirectory) -> dict[str, int]:
    """Rows and cached tokens in the committed parts: what is on the disk, not what was meant."""
    ok = pl.col("status") == "ok"
    columns = [
        ok.sum().alias("rows_ok"),
        (~ok).sum().alias("rows_error"),
        pl.col("cached_tokens").cast(pl.Int64).sum().alias("cached_tokens"),
    ]
    rows = directory.scan()
    if "degenerate" in rows.collect_schema():
        is_skewed = (pl.col("skew") > 0) | (pl.col("duplicate_positions") > 0)
        columns += [
            pl.col("degenerate").sum().alias("rows_degenerate"),
            (pl.col("evictions") > 0).sum().alias("rows_evicting"),
            is_skewed.sum().alias("rows_skewed"),
        ]
    counted: dict[str, int] = rows.select(columns).collect().row(0, named=True)
    return counted


def _count_prompt_tokens(directory: RunDirectory) -> int:
    """Prompt tokens of all committed rows, as they were counted when these ran."""
    total = directory.scan().select(pl.col("prompt_tokens").cast(pl.Int64).sum()).collect()
    return int(total.item() or 0)
