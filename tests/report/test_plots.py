"""What a picture shows lies within its frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from pipeline.report import plots
from pipeline.report.bins import DepthBin


class Depths:
    """All that the picture asks of a run's metrics."""

    def __init__(self, seconds: list[float]) -> None:
        self.depths = tuple(
            DepthBin(str(place), 1, 1, 0, one, one, one) for place, one in enumerate(seconds)
        )


@pytest.mark.parametrize("seconds", [[0.28, 0.29], [1.03, 0.985, 1.02], [5.0], [0.0]])
def test_the_mark_of_the_slowest_rows_is_drawn_whole(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: rows that took about as long as each other lay on the upper edge, half cut."""
    figures: list[Figure] = []

    def keep(_: str, __: str, draw: Callable[[Figure], None]) -> str:
        figures.append(Figure(figsize=(4.2, 2.5)))
        draw(figures[0])
        return ""

    monkeypatch.setattr(plots, "to_svg", keep)
    metrics: Any = Depths(seconds)
    plots.draw_latency(metrics)
    bottom, top = figures[0].axes[0].get_ylim()
    assert bottom == 0 and top > 1.05 * max(seconds)
