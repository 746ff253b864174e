"""The plan of a job as its run directory keeps it. Knows nothing about how it came about."""

from __future__ import annotations

import polars as pl

from pipeline.errors import RunDirectoryError
from pipeline.job.planning import PlannedJob
from pipeline.plan.frames import tree_frame
from pipeline.storage.run_directory import PLAN_NAME, RunDirectory
from pipeline.storage.summaries import PLAN_SUMMARY


def check_plan(planned: PlannedJob, directory: RunDirectory) -> bool:
    """Whether the directory has the plan already, whole. Raises RunDirectoryError for another."""
    known, summary = PLAN_SUMMARY.read(directory.root), planned.summary
    if known is None:
        return False
    before = known["plan_hash"]
    if before != summary.plan_hash:
        raise RunDirectoryError(
            f"{directory.name} was planned differently ({before[:12]}, now "
            f"{summary.plan_hash[:12]}); finish it with the coppice that began it"
        )
    return directory.planned_rows() is not None


def write_plan(planned: PlannedJob, directory: RunDirectory) -> None:
    """Write it; the summary last."""
    frame = planned.frame()
    if len(planned.rows) < len(frame):
        frame = frame.filter(pl.col("row_index").is_in(planned.rows))
    directory.write_frame(PLAN_NAME, frame)
    directory.write_frame("plan/tree.parquet", tree_frame(planned.plan))
    directory.write_json(PLAN_SUMMARY.name, planned.summary.to_json())
