"""The table of groups: every row once, whatever is listed, summed or unknown."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.report.groups import Group, Others, measure_groups
from tests.report.run_sample import audited_rows, make_run, output_rows, tree_nodes


def with_every_column(rows: pl.DataFrame) -> pl.LazyFrame:
    return rows.with_columns(dedup_of=pl.lit(None, pl.String)).lazy()


def test_every_row_is_in_one_line() -> None:
    rows = output_rows()
    table = measure_groups(with_every_column(rows), tree_nodes(), audited_rows())
    assert table.ungrouped is not None and table.smaller is None
    lines: list[Group | Others] = [*table.largest, table.ungrouped]
    assert sum(line.rows for line in lines) == 1203
    assert sum(line.saved_tokens for line in lines) == rows["cached_tokens"].sum()
    assert sum(line.failed for line in lines) == table.ungrouped.failed == 3
    assert sum(line.audited or 0 for line in lines) == 299
    assert sum(line.differing or 0 for line in lines) == 2
    assert table.ungrouped.audited == audited_rows()["group_id"].null_count() > 0
    counts = rows["group_id"].value_counts().drop_nulls()
    assert {group.group_id: group.rows for group in table.largest} == dict(counts.iter_rows())


def test_a_group_has_the_numbers_of_its_rows() -> None:
    rows, audited = output_rows(), audited_rows()
    table = measure_groups(with_every_column(rows), tree_nodes(), audited)
    (first,) = (group for group in table.largest if group.group_id == 1)
    mine = rows.filter(pl.col("group_id") == 1)
    assert first.latency_p50_s == pytest.approx((mine["latency_s"] - mine["queue_s"]).median())
    assert first.prefix_tokens == tree_nodes().filter(pl.col("node") == 1)["end"].item()
    assert first.audited == (audited["group_id"] == 1).sum() > 0 and first.differing == 0
    assert table.largest[0].rows == max(group.rows for group in table.largest)


def test_smaller_groups_are_summed() -> None:
    groups = np.repeat(np.arange(300), np.where(np.arange(300) < 200, 3, 2))
    rows = pl.DataFrame({"group_id": groups}).with_columns(
        status=pl.lit("ok"), cached_tokens=pl.lit(7), latency_s=pl.lit(1.0), queue_s=pl.lit(0.5)
    )
    table = measure_groups(with_every_column(rows), None, None)
    assert len(table.largest) == 200 and {group.rows for group in table.largest} == {3}
    assert table.smaller == Others(100, 200, 1400, 0, None, None)
    assert table.ungrouped is None


def test_what_nobody_measured_is_unknown() -> None:
    """Copied rows have no time of their own; rows of tenants name groups that are no nodes."""
    rows = pl.DataFrame(
        {
            "group_id": [2**62, 2**62], "status": ["ok", "error"], "cached_tokens": [5, None],
            "latency_s": [1.0, None], "queue_s": [0.0, None], "dedup_of": ["a", None],
        }
    )  # fmt: skip
    (group,) = measure_groups(rows.lazy(), tree_nodes(), None).largest
    assert (group.prefix_tokens, group.latency_p50_s, group.audited) == (None, None, None)
    assert (group.rows, group.failed, group.saved_tokens) == (2, 1, 5)


def render_elsewhere(root: Path) -> int:
    """The most memory, MiB, that a process of its own needs to render the run in `root`."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from pipeline.report.page import render\n"
        "from pipeline.storage.run_directory import RunDirectory\n"
        "render(RunDirectory.open(Path(sys.argv[1])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)\n"
    )
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
def test_a_million_rows_are_reported_in_bounded_memory(tmp_path: Path) -> None:
    """In 200,000 groups and a hundred parts, with 800 characters of text each.

    Seen red: with the rows collected before they are measured, 1.1 GiB more than a small run needs.
    """
    small = make_run(tmp_path / "run", output_rows().head(1200)).root
    least = render_elsewhere(small)
    (part,) = (small / "data").iterdir()
    rows = pl.read_parquet(part)
    text = pl.col("id").str.pad_start(800, "x")
    for number in range(1, 100):
        row = np.arange(number * 10_000, (number + 1) * 10_000)
        more = rows[row % 1200].with_columns(row_index=row, id=row.astype(str))
        more = more.with_columns(generated_text=text, group_id=pl.col("row_index") % 200_000)
        more.write_parquet(part.with_name(f"part-{number:05d}-{number:012x}.parquet"))
    start = time.perf_counter()
    grown = render_elsewhere(small) - least
    assert grown < 400 and time.perf_counter() - start < 60, grown
    assert (small / "report.html").stat().st_size < 1 << 20
