"""The picture of the tree, against the plan that it was written from."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline.plan.frames import largest_nodes, tree_frame
from pipeline.report.tree import TREE_COLUMNS, Box, TreePicture, picture_of
from pipeline.run import plan_job
from pipeline.settings import JobSettings
from tests.report.run_sample import tree_nodes
from tests.tiny_job import write_prompts


def test_boxes_lie_where_the_plan_has_them(settings: JobSettings, tmp_path: Path) -> None:
    """Prompts that are prefixes of others, twins and rows alone; all 400 boxes to the row.

    Seen red: with all rows below a node counted, not those that end in it.
    """
    prompts = ["ab", "abc", "abc", "abcd", "abx", *(f"abx{i}" for i in range(500)), "q", "qq", "z"]
    source = write_prompts(tmp_path / "p.parquet", prompts)
    plan = plan_job(str(source), settings).plan
    picture = picture_of(tree_frame(plan).select(TREE_COLUMNS))
    assert picture.nodes == plan.tree.num_nodes
    assert [tuple(box) for box in picture.boxes] == [tuple(b) for b in largest_nodes(plan).tolist()]


def test_a_picture_reaches_as_far_as_its_boxes() -> None:
    picture = picture_of(tree_nodes())
    assert (picture.rows, picture.tokens, picture.nodes) == (1200, 396, 265)
    assert picture.svg.count("<rect") == picture.svg.count("<title>") == 265
    assert "1,200 rows share tokens 1 to 12" in picture.svg


def test_a_plan_without_a_node_has_a_picture() -> None:
    empty = TreePicture((), 0)
    assert (empty.rows, empty.tokens, empty.svg.count("<rect")) == (1, 1, 0)
    assert picture_of(tree_nodes().head(1).with_columns(rows=pl.lit(3))).boxes == (
        Box(0, 3, 0, 12),
    )
