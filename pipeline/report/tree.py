"""The prefix tree as a picture: rows from left to right, tokens of the prompt from the top down.

Plain SVG that stretches with the page, so that its labels are the page's own text at every width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.report.formats import count

TREE_COLUMNS: Final = ("node", "parent", "start", "end", "rows")
_DRAWN: Final = 400


class Box(NamedTuple):
    """A node of the tree: rows `[row_lo, row_hi)` share prompt tokens `[start, end)`."""

    row_lo: int
    row_hi: int
    start: int
    end: int


class TreePicture(NamedTuple):
    """The largest of `nodes` nodes, and how far rows and tokens reach."""

    boxes: tuple[Box, ...]
    nodes: int

    @property
    def rows(self) -> int:
        """One more than the last row below a box; at least 1."""
        return max((box.row_hi for box in self.boxes), default=1)

    @property
    def tokens(self) -> int:
        """Where the deepest box ends; at least 1."""
        return max((box.end for box in self.boxes), default=1)

    @property
    def svg(self) -> str:
        """An `<svg>` element of any width and height; each box says in words what it is."""
        return (
            f'<svg class="tree" viewBox="0 0 {self.rows} {self.tokens}" preserveAspectRatio="none" '
            'role="img" aria-label="Prefixes of the prompts and the rows below them">'
            f"{''.join(_rectangles(self.boxes))}</svg>"
        )


def picture_of(tree: pl.DataFrame) -> TreePicture:
    """The nodes with most rows x tokens of `plan/tree.parquet`, whose order is depth first."""
    rows, parent = tree["rows"].to_numpy(), tree["parent"].fill_null(-1).to_numpy()
    low = _rows_before(rows, parent)
    area = rows * (tree["end"] - tree["start"]).to_numpy()
    chosen = np.sort(np.argsort(-area, kind="stable")[:_DRAWN])
    corners = np.stack([low, low + rows, tree["start"].to_numpy(), tree["end"].to_numpy()], 1)
    return TreePicture(tuple(Box(*box) for box in corners[chosen].tolist()), tree.height)


def _rows_before(rows: NDArray[np.int64], parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """[nodes] rows that come before the first one below each node.

    Depth first, a node's own rows (those that end in it) come before those of its children.
    """
    inner = parent >= 0
    below = np.bincount(parent[inner], weights=rows[inner], minlength=len(rows))
    own = rows - below.astype(np.int64)
    return np.cumsum(own) - own


def _rectangles(boxes: Sequence[Box]) -> Iterator[str]:
    for index, box in enumerate(boxes):
        rows = box.row_hi - box.row_lo
        kind = "own" if rows == 1 else f"shared{index % 2}"
        yield (
            f'<rect class="{kind}" x="{box.row_lo}" y="{box.start}" width="{rows}" '
            f'height="{box.end - box.start}"><title>{_describe(box, rows)}</title></rect>'
        )


def _describe(box: Box, rows: int) -> str:
    tokens = f"tokens {count(box.start + 1)} to {count(box.end)}"
    return f"{tokens} of one row" if rows == 1 else f"{count(rows)} rows share {tokens}"
