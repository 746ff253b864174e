"""Operations that fail or kill: every n-th one here, all of them in `make torture`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.job.answers import AnswerWriter
from pipeline.storage import durable, run_directory
from pipeline.storage.durable import is_temp
from pipeline.storage.lock import FolderLock
from tests.torture.audit_bench import AuditBench, finished_run
from tests.torture.disk import WatchedDisk, When
from tests.torture.job import Content, RunBench
from tests.torture.sweep import sweep_errors, sweep_kills
from tests.torture.victim import Server


@pytest.mark.fault(
    "disk full or EIO",
    injected="the n-th file operation of a job, for all n in make torture",
    outcome="resumable; the next call gives the same output",
)
@pytest.mark.parametrize(
    ("code", "lasts", "first"),
    [(errno.ENOSPC, False, 0), (errno.EIO, False, 4), (errno.ENOSPC, True, 8)],
)
def test_any_operation_may_fail(
    tmp_path: Path, tokenizer_folder: Path, code: int, lasts: bool, first: int
) -> None:
    """Also with a disk that stays full until the command has ended.

    Seen red: a lock that stays held, a session counted twice, `failed` on a sealed run, a torn line
    of metrics; and each fault of `PLANTED`.
    """
    bench = RunBench(tmp_path / "job", tokenizer_folder)
    figures = sweep_errors(bench, code, lasts, range(first, 1000, 21))
    assert figures.operations > 150 and figures.faults > 6


@pytest.mark.fault(
    "SIGKILL",
    injected="before, within and behind the n-th file operation, for all n in make torture",
    outcome="no row lost or doubled after the next call",
)
@pytest.mark.parametrize(
    ("when", "first"),
    [("before", 3), pytest.param("halfway", 11, marks=pytest.mark.slow), ("after", 7)],
)
def test_any_operation_may_be_the_last(
    tmp_path: Path, tokenizer_folder: Path, server: Server, when: When, first: int
) -> None:
    """Seen red: 256 answers ahead of a writer of four rows."""
    bench = RunBench(tmp_path / "job", tokenizer_folder)
    assert sweep_kills(bench, server, when, range(first, 1000, 34)).kills > 4


def test_parts_in_the_order_of_the_input_are_no_different(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    bench = RunBench(tmp_path / "job", tokenizer_folder, (("preserve_order", True),))
    assert sweep_errors(bench, errno.EIO, False, range(5, 1000, 43)).faults > 2


class LostPart(RunBench):
    """A job that was complete and audited, and lost a part since."""

    def prepare(self) -> None:
        """Do the job, then take a part away."""
        super().prepare()
        self.run()
        (self.output / "audit").mkdir()
        (self.output / "audit" / "summary.json").write_text('{"verdict": "pass"}')
        min(self.output.glob("data/*.parquet")).unlink()

    def check_trusted(self) -> None:
        """The mark of a complete job is believed only by who has counted its rows."""

    def check_finished(self, expected: Content, calls: int) -> None:
        """The verdict on other rows must not be there any more."""
        super().check_finished(expected, calls + 1)
        assert not (self.output / "audit" / "summary.json").exists()


def test_no_audit_outlives_rows_that_are_made_again(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Seen red: the mark was taken away before the audit."""
    bench = LostPart(tmp_path / "job", tokenizer_folder)
    assert sweep_errors(bench, errno.EIO, False, range(12)).faults == 12


def test_an_audit_and_its_report_are_old_or_new(
    tmp_path: Path, model_folder: Path, server: Server
) -> None:
    """Seen red: `replace_file` that writes in place."""
    finished = finished_run(tmp_path / "finished", model_folder)
    bench = AuditBench(tmp_path / "copy", finished)
    assert sweep_errors(bench, errno.ENOSPC, False, range(2, 100, 13)).faults == 3
    assert sweep_kills(bench, server, "halfway", [3, 18]).kills == 2


def test_nothing_is_written_unseen(tmp_path: Path, tokenizer_folder: Path) -> None:
    """What a library writes by itself escapes the sweeps. Seen red: polars' `write_parquet`."""
    bench = RunBench(tmp_path / "job", tokenizer_folder)
    bench.prepare()
    before = set(bench.base.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        disk = WatchedDisk(patch, bench.base)
        bench.run()
    unlinked = [o.path for o in disk.operations if o.name == "unlink"]
    made = {str(p.relative_to(bench.base)) for p in set(bench.base.rglob("*")) - before}
    assert made <= {o.path for o in disk.operations}
    opened = {o.path for o in disk.operations if o.name in ("open", "replace")}
    assert {path for path in unlinked if not is_temp(Path(path))} <= opened


def in_place(path: Path, content: bytes) -> None:
    """As `replace_file`, without a second file."""
    with durable.write_errors(path):
        durable.make_folder(path.parent)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            durable.write_all(file, content)
        finally:
            os.close(file)


def forget_a_row(writer: AnswerWriter, completion: object, add: Callable[..., None]) -> None:
    """As `AnswerWriter.add`, but of a resumed job the first answer is dropped."""
    if writer._next_part == 0 or writer.counts.ok:
        add(writer, completion)
    else:
        writer.counts.ok += 1


PLANTED: dict[str, tuple[object, str, object]] = {
    "files written in place": (run_directory, "replace_file", in_place),
    "a lock that is kept": (FolderLock, "release", lambda lock: None),
    "no room on the disk is no matter": (durable, "write_all", lambda file, content: None),
    "a row of a resumed job forgotten": (
        AnswerWriter,
        "add",
        lambda writer, completion, add=AnswerWriter.add: forget_a_row(writer, completion, add),
    ),
}


@pytest.mark.parametrize(
    "fault",
    [
        "a row of a resumed job forgotten",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in list(PLANTED)[:-1]),
    ],
)
def test_the_sweep_finds_what_is_planted(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A check that cannot fail is none."""
    bench = RunBench(tmp_path / "job", tokenizer_folder)
    monkeypatch.setattr(*PLANTED[fault])
    with pytest.raises(Exception):  # noqa: B017  (an assertion, or a reader of a half file)
        for code in (errno.ENOSPC, errno.EIO):
            sweep_errors(bench, code, False, range(60, 1000, 5))
