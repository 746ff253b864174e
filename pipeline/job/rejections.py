"""Why rows cannot run, as a person wants to hear it: reasons with counts, and examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.plan.plan import Names
from pipeline.prompts import Rejected

_EXAMPLES = 5


def describe_rejected(rejected: Mapping[int, Rejected], ids: Names) -> dict[str, Any] | None:
    """`reasons` (error type -> rows, most first) and `examples` of all reasons; None: no row."""
    if not rejected:
        return None
    reasons = Counter(bad.error_type for bad in rejected.values())
    in_order = [bad for _, bad in sorted(rejected.items())]
    firsts = {bad.error_type: bad for bad in reversed(in_order)}
    chosen = [firsts[kind] for kind, _ in reasons.most_common(_EXAMPLES)]
    chosen += [bad for bad in in_order if bad not in chosen]
    shown = sorted(chosen[:_EXAMPLES], key=lambda bad: bad.row_index)
    return {
        "reasons": dict(reasons.most_common()),
        "examples": [
            {"id": ids[bad.row_index], "error_type": bad.error_type, "message": bad.message}
            for bad in shown
        ],
    }
