"""How far a run directory is, also while another process works on it. Changes nothing."""

from __future__ import annotations

from typing import Any

from pipeline.audit.gate import current_verdict
from pipeline.errors import RunDirectoryError
from pipeline.job.planning_watch import read_note
from pipeline.location import Location
from pipeline.storage.manifest import notes_of
from pipeline.storage.metrics_log import last_metrics
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.run_location import reading_run

_UNKNOWN: dict[str, Any] = {
    "status": "planning", "rows": 0, "rows_done": 0, "rows_failed": 0, "rows_left": 0,
    "rows_per_s": None, "prefill_tokens_per_s": None, "decode_tokens_per_s": None,
    "eta_s": None, "at": None, "audit": None, "calibration": None, "notes": [],
    "counters": {},
}  # fmt: skip


def read_status(run: Location) -> dict[str, Any]:
    """Rows by outcome, and the last rates that a session noted (None before the first note).

    `eta_s` is there only while the job is planned or running. While it is planned, `rows_read`
    says how far that is; the run need not exist yet. `audit`: what `audit/gate.py` finds of a
    complete run; `calibration`: of documents, as run.json has it; `notes`: what else one should
    know of the run. Raises RunDirectoryError if there is no run, StorageError if it was complete
    and is not any more.
    """
    note = read_note(run)
    try:
        with reading_run(run, parts=False) as directory:
            state = _describe(directory)
    except RunDirectoryError:
        if note is None:
            raise
        state = _UNKNOWN | {"rows": note["rows_total"], "rows_left": note["rows_total"]}
    if note is None:
        return state
    return state | {"status": "planning", "rows_read": note["rows_done"], "eta_s": note["eta_s"]}


def wait_for_status(run: Location) -> dict[str, Any]:
    """As `read_status`; where there is no run yet, the state is `waiting`."""
    try:
        return read_status(run)
    except RunDirectoryError:
        return _UNKNOWN | {"status": "waiting"}


def _describe(directory: RunDirectory) -> dict[str, Any]:
    manifest, root = directory.read_manifest(), directory.root
    if directory.is_sealed:
        directory.check_committed()
    answered, failed = directory.count_rows()
    planned = directory.planned_rows()  # of a shard these are not all of the input
    rows = manifest.get("input", {}).get("rows", 0) if planned is None else len(planned)
    done = answered + failed
    last = last_metrics(root)
    rows_per_s = last.get("rows_per_s")
    # A session that was killed could not say so itself.
    died = manifest["status"] == "running" and directory.is_abandoned
    status = "stopped" if died else manifest["status"]
    return {
        "status": status,
        "rows": rows,
        "rows_done": done,
        "rows_failed": failed,
        "rows_left": rows - done,
        "rows_per_s": rows_per_s,
        "prefill_tokens_per_s": last.get("prefill_tokens_per_s"),
        "decode_tokens_per_s": last.get("decode_tokens_per_s"),
        "eta_s": (rows - done) / rows_per_s if status == "running" and rows_per_s else None,
        "at": last.get("at"),
        "audit": current_verdict(directory) if directory.is_sealed else None,
        "calibration": manifest.get("calibration"),
        "notes": notes_of(manifest),
        "counters": manifest["counters"],
    }
