"""Numbers as people read them. A number that nobody measured is a dash."""

from __future__ import annotations

import re
from typing import Final

_UNKNOWN: Final = "–"
_MARKDOWN: Final = re.compile(r"([\\`*_\[\]!|])")


def count(value: float | None) -> str:
    """`1234567` -> `1,234,567`."""
    return _UNKNOWN if value is None else f"{value:,.0f}"


def decimal(value: float | None) -> str:
    """Three significant digits, or whole numbers from a hundred on."""
    if value is None:
        return _UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """`0.7841` -> `78.4 %`; never rounded to a nothing or a whole that it is not."""
    if value is None:
        return _UNKNOWN
    shown = f"{100 * value:.1f}" if value == 0 or value >= 0.001 else f"{100 * value:.2g}"
    return "99.9 %" if shown == "100.0" and value < 1 else f"{shown} %"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return _UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def duration(value: float | None) -> str:
    """Seconds as `0.42 s`, `12.3 s`, `4 min 02 s`, `3 h 07 min`."""
    if value is None:
        return _UNKNOWN
    if value < 59.95:  # 59.95 would be rounded to "60 s"
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def change(value: float | None, before: float | None, points: bool = False) -> str:
    """Against an earlier number: `+12 %`, with `points` (both are shares) `-1.3 points`.

    Empty where there is nothing to compare; from nothing to something is no percentage.
    """
    if value is None or before is None or (before == 0 and not points):
        return ""
    by = 100 * (value - before) if points else 100 * (value / before - 1)
    shown = f"{abs(by):.1f}" if points or abs(by) < 10 else f"{abs(by):,.0f}"
    unit = "points" if points else "%"
    if float(shown.replace(",", "")) == 0:
        return f"±0 {unit}"
    return f"{'+' if by > 0 else '−'}{shown} {unit}"
