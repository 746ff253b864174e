"""What an audit says about the rows that are committed now, counted again from its rows.

A summary is one file that anybody can write, and so are counters: a verdict is believed where the
audited rows bear it out, the parts are the ones that were audited, and the bar was not lower than
the one that is asked for. Whoever can forge the audited rows as well can publish what he likes.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import polars as pl

from pipeline.audit.sample import candidate_rows
from pipeline.settings import AuditSettings
from pipeline.storage.run_directory import AUDIT_NAMES, RunDirectory
from pipeline.storage.run_tables import read_table
from pipeline.storage.summaries import AUDIT_AGAIN, AUDIT_SUMMARY

Finding = Literal["pass", "fail", "stale", "laxer", "unfounded"]
WHY_NOT = {
    None: "was not audited",
    "stale": "has changed since its audit",
    "laxer": "was audited by a lower bar than is asked for now",
    "unfounded": "has an audit whose rows do not bear out its verdict",
}
"""By finding, why a run whose audit did not fail has still not passed."""
_COLUMNS = ("id", "row_index", "audit_exact", "audit_class")
_EXPLAINED = ("identical", "near_tie")


def current_verdict(directory: RunDirectory, bar: AuditSettings | None = None) -> Finding | None:
    """What was found about the rows that are committed now, by a bar no lower than `bar`.

    "stale": about other rows; "laxer": by a lower bar, or by one that nobody knows; "unfounded":
    the audited rows say something else, or are gone; None: nothing. Without `bar` any bar will do.
    Where the parts are not here, groups are not counted again. Raises RunDirectoryError if a file
    of the audit is damaged.
    """
    summary = AUDIT_SUMMARY.read(directory.root)
    if summary is None:
        return None
    if summary["seed"] != seed_of_output(directory):
        return "stale"
    if summary["verdict"] == "fail":
        return "fail"
    if not _is_borne_out(directory, summary):
        return "unfounded"
    return "laxer" if bar is not None and _is_laxer(directory, summary, bar) else "pass"


def seed_of_output(directory: RunDirectory) -> int:
    """A seed that nobody could choose before the output was committed: 63 bits."""
    digest = hashlib.sha256("\n".join(directory.part_names()).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _is_borne_out(directory: RunDirectory, summary: dict[str, Any]) -> bool:
    """Whether the audited rows are rows of this run and come to what the summary says."""
    rows = read_table(directory.root / AUDIT_NAMES[1], _COLUMNS, AUDIT_AGAIN)
    if rows is None or rows["row_index"].n_unique() != rows.height:
        return False
    found = dict(rows["audit_class"].value_counts().iter_rows())
    classes = {name: found.pop(name, 0) for name in summary["classes"]}
    exact = (rows["audit_class"] == "identical") == rows["audit_exact"]
    explained = sum(classes[name] for name in _EXPLAINED)
    least = summary.get("bar", {}).get("audit_min_exact", 0.0)
    free = summary["free_running"]
    return (
        0 < rows.height == summary["rows_audited"]
        and not found
        and classes == summary["classes"]
        and bool(exact.all())
        and not classes["corrupt"]
        and explained >= least * rows.height
        and summary["groups_covered"] == summary["groups_total"]
        and not free["unexplained"]
        and _covers_groups(directory, rows)
    )


def _covers_groups(directory: RunDirectory, audited: pl.DataFrame) -> bool:
    """Whether all audited rows were answered here, and every group has one among them."""
    if not directory.has_parts:
        return True
    try:
        answered = candidate_rows(directory.scan()).select("id", "row_index", "group_id")
    except (pl.exceptions.PolarsError, OSError):  # whoever uses the parts says which one it is
        return False
    chosen = answered.join(audited, on=["id", "row_index"])
    groups, covered = (f["group_id"].drop_nulls().n_unique() for f in (answered, chosen))
    return chosen.height == audited.height and groups == covered


def _is_laxer(directory: RunDirectory, summary: dict[str, Any], bar: AuditSettings) -> bool:
    said = summary.get("bar")
    if said is None:
        return True
    held = AuditSettings.model_validate(said)
    total = summary.get("rows_auditable", 0)
    if directory.has_parts:
        total = candidate_rows(directory.scan()).height
    wanted, seen = bar.num_rows(total), summary["rows_audited"] + summary.get("rows_left_out", 0)
    return (
        held.num_rows(total) < wanted
        or seen < wanted
        or held.audit_min_exact < bar.audit_min_exact
        or held.audit_free_running < bar.audit_free_running
        or held.audit_arms < bar.audit_arms
    )
