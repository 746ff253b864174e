"""Small pictures of a few numbers over nights: one bar a night, plain SVG that stretches.

Knows numbers and labels; no files and no page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from markupsafe import Markup, escape

from pipeline.costs import money
from pipeline.report.formats import change, count, decimal, duration, percent
from pipeline.report.trend import Night

_SLOT: Final = 10  # of which a bar fills 8
_HEIGHT: Final = 100
_LEAST: Final = 3  # of a bar whose number is not zero
_FEWEST_SLOTS: Final = 7
# Kind and height of the bar, so that colour is not all that tells; its words; the value.
_VERDICTS: Final[dict[str | None, tuple[str, float, str, str]]] = {
    "pass": ("bar", _HEIGHT, "audit passed", "passed"),
    "fail": ("bad", _HEIGHT / 2, "audit failed", "FAILED"),
    None: ("none", 2, "not audited", "–"),
}


class Spark(NamedTuple):
    """One small picture: `value` and `against` are those of the last night, `top` is a full bar."""

    name: str
    value: str
    against: str
    top: str
    svg: Markup


def draw_trend(nights: Sequence[Night]) -> list[Spark]:
    """Rows, failures, time, saving, speed and verdict; empty if there is nothing to compare."""
    if not nights:
        return []
    return [
        _spark("rows answered", [n.rows_ok for n in nights], nights, count),
        _spark("rows failed", [n.rows_failed for n in nights], nights, count, "bad"),
        _spark("wall time", [n.wall_s for n in nights], nights, duration),
        _spark("prompt tokens saved", [n.saved_share for n in nights], nights, percent),
        _spark("generated tokens/s", [n.tokens_per_s for n in nights], nights, decimal),
        *_turns(nights),
        *_costs(nights),
        _verdicts(nights),
    ]


def _turns(nights: Sequence[Night]) -> list[Spark]:
    """Of conversations, where some night has any."""
    repeated = [night.degenerate_share for night in nights]
    evicting = [night.evicting_share for night in nights]
    if all(share is None for share in (*repeated, *evicting)):
        return []
    return [
        _spark("turns that repeat themselves", repeated, nights, percent, "bad"),
        _spark("turns that gave up tokens", evicting, nights, percent),
    ]


def _costs(nights: Sequence[Night]) -> list[Spark]:
    costs = [night.cost for night in nights]
    return [] if not any(costs) else [_spark("cost", costs, nights, money)]


def _spark(
    name: str,
    values: Sequence[float | None],
    nights: Sequence[Night],
    form: Callable[[float | None], str],
    kind: str = "bar",
) -> Spark:
    known = [value for value in values if value is not None]
    earlier = [value for value in values[:-1] if value is not None]
    is_share = form is percent
    scale = 1.0 if is_share else max(known, default=0.0) or 1.0
    bars = "".join(
        _bar(index, night.date, form(value), value, scale, kind)
        for index, (night, value) in enumerate(zip(nights, values, strict=True))
    )
    against = change(values[-1], earlier[-1] if earlier else None, points=is_share)
    top = "of 100 %" if is_share else f"most {form(max(known, default=None))}"
    return Spark(name, form(values[-1]), against, top, _svg(f"{name}, by night", bars, nights))


def _bar(index: int, date: str, shown: str, value: float | None, scale: float, kind: str) -> str:
    """A bar as high as its number; zero is a line on the ground, no number a faint one."""
    high = 0.0 if value is None else max(_LEAST, _HEIGHT * value / scale)
    name = "none" if value is None else "zero" if value == 0 else kind
    high = 2 if name in ("none", "zero") else high
    return _rectangle(index, high, name, f"{date}: {shown}")


def _rectangle(index: int, high: float, kind: str, words: str) -> str:
    return (
        f'<rect class="{kind}" x="{index * _SLOT + 1}" y="{_HEIGHT - high:.4g}" '
        f'width="{_SLOT - 2}" height="{high:.4g}"><title>{escape(words)}</title></rect>'
    )


def _verdicts(nights: Sequence[Night]) -> Spark:
    bars = ""
    for index, night in enumerate(nights):
        kind, high, words, value = _VERDICTS[night.verdict]
        bars += _rectangle(index, high, kind, f"{night.date}: {words}")
    audited = [night for night in nights if night.verdict]
    passed = sum(night.verdict == "pass" for night in audited)
    against = f"{passed} of {len(audited)} nights passed"
    return Spark("audit", value, against, "", _svg("audit verdict, by night", bars, nights))


def _svg(label: str, bars: str, nights: Sequence[Night]) -> Markup:
    width = _SLOT * max(len(nights), _FEWEST_SLOTS)
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width} {_HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(label)}; the numbers are in the table below">{bars}</svg>'
    )
