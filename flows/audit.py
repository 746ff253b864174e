"""The audit and the report as a flow that fails below the bar, so that nothing follows it."""

from typing import Any

from flows.artifacts import PrefectObserver
from flows.credentials import find_credentials
from flows.parameters import AuditForm, checked_flow
from flows.tasks import as_task
from pipeline.audit.auditing import audit_run
from pipeline.cli.layers import merge_section, split_store
from pipeline.errors import AuditFailed
from pipeline.location import Location
from pipeline.run import write_report
from pipeline.settings import AuditSettings


@checked_flow("coppice-audit")
def audit(
    output: str, settings: AuditForm | None = None, credentials: str | None = None
) -> dict[str, Any]:
    """Audit the run in `output`, then report; a failed audit is reported and fails the flow.

    `credentials`: a block of S3 credentials of this name.
    """
    others, store = split_store({} if settings is None else settings.flat())
    chosen = merge_section(AuditSettings, others)
    run = Location(output, store.overridden_by(find_credentials(credentials)))
    with PrefectObserver() as observer:

        def check() -> dict[str, Any]:
            verdict = audit_run(run, chosen, observer)
            verdict.check(output)
            return {"verdict": verdict.verdict, "rows_audited": verdict.rows_audited}

        def report() -> None:
            found = as_task("report", lambda: write_report(run))
            observer.show_report(f"Report of {output}", run, **found)

        try:
            found = as_task("audit", check)
        except AuditFailed:
            report()
            raise
        report()
        return found
