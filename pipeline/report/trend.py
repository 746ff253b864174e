"""The last nights of one job, as numbers. Reads no files, draws nothing.

What a night's files say is checked value by value: a damaged file costs its numbers, not the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipeline.costs import NO_COSTS, CostSettings, cost_of, price_of
from pipeline.storage.nights import NightFiles

DAMAGED: Final = "damaged"
_MOST: Final = 2**63  # of any number that a run counts
_STATES: Final = ("running", "complete", "stopped", "failed")


@dataclass(frozen=True)
class Night:
    """One night. A number that is not known is None, and so is the verdict of no audit.

    `state`: as run.json has it, or "damaged", "interrupted" (nobody is working on it any more).
    `page`: relative address of the night's own page, if it is there. Of a job with conversations:
    shares of the turns that repeat themselves and that gave up tokens; `skewed`, as many turns as
    have keys that stand where they must not.
    """

    date: str
    state: str
    page: str | None = None
    rows_ok: float | None = None
    rows_failed: float | None = None
    wall_s: float | None = None
    saved_share: float | None = None
    tokens_per_s: float | None = None
    verdict: str | None = None
    cost: float | None = None
    degenerate_share: float | None = None
    evicting_share: float | None = None
    skewed: float | None = None


def read_trend(nights: Sequence[NightFiles], price: CostSettings = NO_COSTS) -> tuple[Night, ...]:
    """Oldest first, the last one is the night that the page is of. Empty for a night alone.

    `price`: over what nights recorded.
    """
    return tuple(_night(files, price) for files in nights) if len(nights) > 1 else ()


def night_before(trend: Sequence[Night]) -> Night | None:
    """The last earlier night that has numbers."""
    earlier = [night for night in trend[:-1] if night.rows_ok is not None]
    return earlier[-1] if earlier else None


def _night(files: NightFiles, price: CostSettings) -> Night:
    page = f"../{files.date}/report.html" if files.has_page else None
    if files.manifest is None:
        return Night(files.date, DAMAGED, page)
    counters = _mapping(files.manifest.get("counters"))
    cached, prefilled = (_number(counters, f"{name}_tokens") for name in ("cached", "prefilled"))
    asked = None if cached is None or prefilled is None else cached + prefilled
    wall = _number(counters, "wall_s")
    verdict = _mapping(files.audit).get("verdict")
    ok = _number(counters, "rows_ok")
    cost = cost_of(price_of(files.manifest, price), wall, 0, None)
    return Night(
        files.date,
        _state(files),
        page,
        ok,
        _number(counters, "rows_error"),
        wall,
        ratio(cached, asked),
        ratio(_number(counters, "generated_tokens"), wall),
        verdict if verdict in ("pass", "fail") else None,
        None if cost is None else cost.total,
        ratio(_number(counters, "rows_degenerate"), ok),
        ratio(_number(counters, "rows_evicting"), ok),
        _number(counters, "rows_skewed"),
    )


def _state(files: NightFiles) -> str:
    said = _mapping(files.manifest).get("status")
    if said not in _STATES:
        return DAMAGED
    return "interrupted" if said == "running" and files.is_abandoned else str(said)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(counters: Mapping[str, Any], name: str) -> float | None:
    value = counters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MOST else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """None where a number is unknown, or the whole is nothing."""
    return None if part is None or not whole else part / whole
