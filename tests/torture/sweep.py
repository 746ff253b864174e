"""Every n-th operation of a command fails, kills its process, or is the last before a power cut.

After each: what readers trust is whole, and one undisturbed call of the same command ends as if
nothing had been.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import Table

from pipeline.errors import CoppiceError
from pipeline.storage import run_directory
from pipeline.storage.part_file import write_part
from tests.torture.disk import KILLED, FailingDisk, WatchedDisk, When
from tests.torture.job import (
    Bench,
    Content,
    RunBench,
    check_run,
    held_locks,
    num_answered,
)
from tests.torture.power_cut import RecordedDisk, Step, cut
from tests.torture.victim import Server, die_at


@dataclass
class Figures:
    """What a torture did. `largest_waste`: answers of the device that one kill cost."""

    operations: int = 0
    faults: int = 0
    kills: int = 0
    cuts: int = 0
    largest_waste: int = 0


def undisturbed(bench: Bench) -> tuple[Content, int]:
    """What the command makes, and by how many operations."""
    bench.prepare()
    with pytest.MonkeyPatch.context() as patch:
        disk = WatchedDisk(patch, bench.base)
        bench.run()
    expected = bench.content()
    bench.check_finished(expected, calls=1)
    return expected, len(disk.operations)


def sweep_errors(bench: Bench, code: int, lasts: bool, numbers: Iterable[int]) -> Figures:
    """The n-th operation fails; with `lasts` the disk stays full until the command has ended."""
    expected, operations = undisturbed(bench)
    figures = Figures(operations)
    for number in numbers:
        bench.prepare()
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, bench.base, number, code, lasts)
            try:
                bench.run()
            except CoppiceError as error:
                assert str(bench.base) in str(error) or "XDG_CACHE_HOME" in str(error), error
        if number >= len(disk.operations):
            break
        assert not held_locks(bench.base), disk.operations[number]
        _go_on(bench, expected)
        figures.faults += 1
    return figures


def sweep_kills(bench: Bench, server: Server, when: When, numbers: Iterable[int]) -> Figures:
    """The process is killed at the n-th operation."""
    expected, operations = undisturbed(bench)
    figures = Figures(operations)
    for number in numbers:
        bench.prepare()
        victim = server.start(die_at, bench, number, when)
        victim.join()
        if victim.exitcode == 0:
            break
        assert victim.exitcode == KILLED
        if bench.most_wasted:
            lost = server.answered.value - num_answered(bench.output)
            figures.largest_waste = max(figures.largest_waste, lost)
        _go_on(bench, expected)
        figures.kills += 1
    assert figures.largest_waste <= bench.most_wasted, figures
    return figures


def _go_on(bench: Bench, expected: Content) -> None:
    bench.check_trusted()
    bench.run()
    bench.check_finished(expected, calls=2)


@dataclass(frozen=True)
class Recording:
    """A run on a disk that was watched. `committed`: after so many steps, these rows were said to
    be on the disk."""

    expected: Content
    steps: list[Step]
    committed: list[tuple[int, list[int]]]


def record(bench: RunBench) -> Recording:
    """Run the job once."""
    bench.prepare()
    committed: list[tuple[int, list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        disk = RecordedDisk(patch, bench.base)

        def write(folder: Path, number: int, table: Table, provenance: dict[str, str]) -> Path:
            path = write_part(folder, number, table, provenance)
            committed.append((len(disk.steps), table.column("row_index").to_pylist()))
            return path

        patch.setattr(run_directory, "write_part", write)
        bench.run()
    return Recording(bench.content(), disk.steps, committed)


def sweep_power_cuts(
    bench: RunBench, recording: Recording, seeds: Iterable[int | None], first: int = 0, by: int = 1
) -> Figures:
    """The power goes after the n-th step; seed None: all that can be lost is lost."""
    steps = recording.steps
    figures = Figures(len(steps))
    for seed in seeds:
        for number in range(first, len(steps) + 1, by):
            bench.prepare()
            luck = None if seed is None else random.Random(f"{seed} {number}")
            cut(steps[:number], bench.base, luck)
            kept = set(check_run(bench.output).tolist())
            for after, rows in recording.committed:
                assert after > number or kept.issuperset(rows), f"rows are lost at {number}"
            _go_on(bench, recording.expected)
            figures.cuts += 1
    return figures
