"""The table of a run's parts."""

from __future__ import annotations

from flows.part_table import part_table
from tests.night.conftest import job  # noqa: F401
from tests.night.job import NightlyJob


def test_the_table_has_a_row_for_each_part_and_no_more_than_asked_for(
    job: NightlyJob,  # noqa: F811
) -> None:
    """Seen red: with the newest parts summed instead of the oldest."""
    job.say(rows_per_part=1)
    job.sit()
    whole = part_table(job.night())
    names = [row["part"] for row in whole]
    assert len(names) == 4 and names == sorted(names)
    assert [row["rows answered"] for row in whole] == [1, 1, 1, 1]
    short = part_table(job.night(), most_rows=2)
    assert [row["part"] for row in short] == ["the first 3 parts", names[-1]]
    assert [row["rows answered"] for row in short] == [3, 1]
