"""The audit and the report as a flow that fails below the bar, so that nothing follows it."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import PrefectObserver
from flows.privacy import without_text
from pipeline.errors import AuditFailed
from pipeline.job.auditing import audit_run
from pipeline.run import report_run
from pipeline.settings import AuditSettings
from pipeline.terminal.options import merge_section, split_store


@task(name="audit", cache_policy=NO_CACHE, persist_result=False)
def audit_rows(output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Audit a run directory. Raises AuditFailed below the bar."""
    others, store = split_store(settings)
    chosen = merge_section(AuditSettings, others)
    with without_text(), PrefectObserver() as observer:
        verdict = audit_run(output, chosen, observer, store)
    if not verdict.passed:
        raise AuditFailed(f"the audit of {output} failed: {'; '.join(verdict.reasons)}")
    return {"verdict": verdict.verdict, "rows_audited": verdict.rows_audited}


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def write_report(output: str, settings: dict[str, Any]) -> str:
    """Write the report; returns the page's path or URL."""
    with without_text():
        return report_run(output, split_store(settings)[1])


@flow(name="coppice-audit", persist_result=False)
def audit(output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Audit the run in `output`, then report; a failed audit is reported and fails the flow."""
    try:
        found = audit_rows(output, settings)
    except AuditFailed:
        write_report(output, settings)
        raise
    write_report(output, settings)
    return found
