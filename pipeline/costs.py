"""What a job costs, in whatever currency an hour was said to cost. Knows no files.

All machines of a job together cost `price_per_hour`, from the start of a session to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from pipeline.forms import Section

_HOUR_S = 3600.0
_MOST_PRICE = 1e12  # beyond, sums of it are no numbers


class CostSettings(Section):
    """What an hour costs; decides no answer. None: nobody asks what a job costs."""

    price_per_hour: float | None = Field(default=None, gt=0.0, le=_MOST_PRICE, allow_inf_nan=False)


NO_COSTS = CostSettings()


def price_of(manifest: Mapping[str, Any], price: CostSettings = NO_COSTS) -> CostSettings:
    """What an hour costs: `price`, or where that says nothing what run.json recorded."""
    if price != NO_COSTS:
        return price
    settings = manifest.get("settings")
    recorded = settings.get("cost") if isinstance(settings, Mapping) else None
    try:
        return CostSettings.model_validate(recorded or {})
    except ValidationError:  # anybody may have written it
        return NO_COSTS


class Cost(NamedTuple):
    """Of a job, or of what a plan says of one. `saved`: what the time that reuse saved would have
    cost. None: nobody knows."""

    price_per_hour: float
    total: float | None = None
    per_1000_rows: float | None = None
    saved: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """By name."""
        return self._asdict()

    def sentence(self) -> str:
        """For a person."""
        if self.total is None:
            return "unknown until a run has measured this model here"
        rows = f", {money(self.per_1000_rows)} per 1,000 rows"
        saved = f"; reuse saves {money(self.saved)}" if self.saved else ""
        return f"{money(self.total)}{rows}{saved}  (at {money(self.price_per_hour)} an hour)"


def cost_of(
    settings: CostSettings, seconds: float | None, rows: float, saved_s: float | None
) -> Cost | None:
    """Of so many seconds for so many rows; None where nobody said what an hour costs."""
    price = settings.price_per_hour
    if price is None:
        return None
    if seconds is None:
        return Cost(price)
    total = price * seconds / _HOUR_S
    saved = None if saved_s is None else price * saved_s / _HOUR_S
    return Cost(price, total, 1000 * total / rows if rows else None, saved)


def cost_of_run(settings: CostSettings, counters: Mapping[str, Any]) -> Cost | None:
    """By the counters of run.json; of a run that has none yet, unknown."""
    seconds, rows = counters.get("wall_s"), counters.get("rows_in", 0)
    return cost_of(settings, seconds, rows, saved_seconds(counters))


def saved_seconds(counters: Mapping[str, Any]) -> float | None:
    """Device time that cached tokens would have taken at the rate of those that were prefilled;
    None where nothing was measured."""
    prefilled, seconds = counters.get("prefilled_tokens", 0), counters.get("prefill_s", 0.0)
    if not prefilled or not seconds:
        return None
    return float(seconds / prefilled * counters.get("cached_tokens", 0))


def money(value: float | None) -> str:
    """`1234.5` -> `1,234.50`; less than one with two digits that count."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"
