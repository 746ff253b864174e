"""What is said of an input whose rows were all read as a job would read them. Knows no model."""

from __future__ import annotations

from typing import Any

from pipeline.job.advised_plan import sample_prompts
from pipeline.job.planning import PlannedJob
from pipeline.job.shown_prompts import show_first


def describe_rows(planned: PlannedJob) -> dict[str, Any]:
    """How many rows there are, why some cannot run, and the first that can as the model sees it."""
    rejections = planned.summary.rejections or {"reasons": {}, "examples": []}
    return {
        "rows": len(planned.ids),
        "rows_rejected": len(planned.rejected),
        **rejections,
        "notes": planned.job.source.columns.describe(),
        **_check_segments(planned),
        "warning": planned.job.tokenizer.looks_rendered(sample_prompts(planned)),
        **show_first(planned),
    }


def _check_segments(planned: PlannedJob) -> dict[str, Any]:
    """Where prompts are in segments, how many would be other tokens if they were tokenised in one
    piece: segments are tokenised apart, so that the same document is the same tokens everywhere."""
    job = planned.job
    if not job.source.columns.has_segments:
        return {}
    count = job.tokenizer.count_changed_by_joining
    changed = sum(count(batch.contents) for batch in job.source.iter_prompts())
    return {"rows_changed_by_joining": changed}
