"""A figure of matplotlib as an inline `<svg>` in the colours of the page that it stands in.

Text stays text and the background is transparent. Every colour is a variable of the page's style
sheet and every property an attribute, so that a picture follows the page from light to dark, and
the page may forbid all styles but its own sheet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Nobody's colours: each stands for one of the page's until the SVG is done.
INK: Final = "#010203"
LEAF: Final = "#010204"
BARK: Final = "#010205"
STONE: Final = "#010206"
BAD: Final = "#010207"
_OF_THE_PAGE: Final = {
    INK: "currentColor", LEAF: "var(--leaf)", BARK: "var(--bark)", STONE: "var(--stone)",
    BAD: "var(--bad)",
}  # fmt: skip
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "coppice",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STONE,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": STONE,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_INCHES: Final = (4.2, 2.5)
_STYLE_ATTRIBUTE: Final = re.compile(r'style="([^"]*)"')
_FONT_SIZE: Final = re.compile(r"([\d.]+)px")


def to_svg(name: str, label: str, draw: Callable[[Figure], None]) -> str:
    """An `<svg>` element for use inside HTML; ids in it begin with `name`. `label` describes it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    size = re.search(r'viewBox="([^"]+)"', svg)
    assert size is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = _STYLE_ATTRIBUTE.sub(_as_attributes, body.replace("url(#", f"url(#{name}-"))
    for ours, theirs in _OF_THE_PAGE.items():
        body = body.replace(ours, theirs)
    return f'<svg viewBox="{size[1]}" role="img" aria-label="{escape(label)}">{body.strip()}'


def _as_attributes(style: re.Match[str]) -> str:
    """`fill: none; stroke-width: 2` -> `fill="none" stroke-width="2"`; of a font only its size."""
    pairs = (part.split(":", 1) for part in style[1].split(";") if ":" in part)
    found = {name.strip(): value.strip() for name, value in pairs}
    font = found.pop("font", None)
    if font is not None and (size := _FONT_SIZE.search(font)):
        found["font-size"] = size[1]
    return " ".join(f'{name}="{value}"' for name, value in found.items())
