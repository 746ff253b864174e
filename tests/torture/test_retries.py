"""A retry of which every n-th file operation fails or is the last."""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import TooManyFailedRows
from pipeline.location import Location
from pipeline.run import retry_job, run_job
from tests.job.test_retrying import Picky
from tests.tiny_job import on
from tests.torture.disk import When
from tests.torture.job import Content, RunBench
from tests.torture.sweep import sweep_errors, sweep_kills
from tests.torture.victim import Server


@dataclass(frozen=True)
class RetryBench(RunBench):
    """`retry_job` of a complete run in which rows of three parts, and all of one, had failed."""

    def prepare(self) -> None:
        """The input, and the run."""
        super().prepare()
        with pytest.MonkeyPatch.context() as patch, suppress(TooManyFailedRows):
            patch.setenv("XDG_CACHE_HOME", str(self.base / "cache"))
            engine = on(Picky(1, 4, 8, 9, 10))
            run_job(str(self.base / "p.parquet"), self.output, self.settings, make_engine=engine)

    def run(self) -> object:
        """The retry."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.base / "cache"))
            return retry_job(Location(str(self.output)), {}, make_engine=on(Picky()))

    def check_finished(self, expected: Content, calls: int) -> None:
        """The run before had a session of its own."""
        super().check_finished(expected, calls + 1)


@pytest.mark.parametrize("ordered", [False, True])
def test_any_operation_of_a_retry_may_fail(
    tmp_path: Path, tokenizer_folder: Path, ordered: bool
) -> None:
    bench = RetryBench(tmp_path / "job", tokenizer_folder, (("preserve_order", ordered),))
    figures = sweep_errors(bench, errno.EIO, False, range(int(ordered), 1000, 19))
    assert figures.operations > 100 and figures.faults > 5


def test_any_operation_of_a_retry_may_be_the_last(
    tmp_path: Path, tokenizer_folder: Path, server: Server
) -> None:
    bench = RetryBench(tmp_path / "job", tokenizer_folder)
    assert sweep_kills(bench, server, _AFTER, range(4, 1000, 23)).kills > 4


_AFTER: When = "after"
