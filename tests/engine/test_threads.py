"""As many threads as others leave free, on machines that are only told of."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine import threads
from pipeline.engine.threads import CPUTime, Threads, read_cpu_time, use_threads
from pipeline.settings import EngineSettings

CPU = torch.device("cpu")


class Machine:
    """Cores that a fair scheduler shares among our threads and `neighbours`, who never sleep."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.neighbours = 0.0
        self.used: list[int] = []
        self._now = CPUTime(time.monotonic(), 0.0, 0.0, cores)

    def read(self) -> CPUTime:
        """A second later."""
        ours = self.used[-1] if self.used else self.cores
        share = min(1.0, self.cores / max(ours + self.neighbours, 1.0))
        clock, busy, own, cores = self._now
        own_now, others_now = ours * share, self.neighbours * share
        self._now = CPUTime(clock + 1.0, busy + own_now + others_now, own + own_now, cores)
        return self._now


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_LOOK_EVERY_S", -10_000.0)


def settled(machine: Machine, most: int) -> Threads:
    machine.used.append(most)
    found = Threads(most, machine.read, machine.used.append)
    for _ in range(100):
        found.adapt()
    return found


@given(st.integers(1, 64), st.data())
def test_neighbours_get_the_cores_that_they_use_and_we_the_others(
    cores: int, data: st.DataObject
) -> None:
    machine = Machine(cores)
    machine.neighbours = data.draw(st.integers(0, 2 * cores))
    most = data.draw(st.integers(1, cores))
    assert settled(machine, most).number == max(1, min(most, cores - int(machine.neighbours)))


def test_a_neighbour_that_comes_and_goes_is_followed_both_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(2)
    found = Threads(2, machine.read, machine.used.append)
    seen = []
    for neighbours in (0, 1, 1, 1, 0, 0, 1, 0):
        machine.neighbours = neighbours
        found.adapt()
        seen.append(found.number)
    assert seen == [2, 1, 1, 1, 2, 2, 1, 2]
    assert machine.used == [1, 2, 1, 2], "asked for only where it changes"
    machine.neighbours = 1
    found.adapt()
    found.restore()
    assert machine.used[-2:] == [1, 2]
    monkeypatch.setattr(threads, "_LOOK_EVERY_S", 10_000.0)
    found.adapt()
    assert machine.used[-1] == 1, "the next run begins where the last one ended"


@pytest.mark.parametrize(("neighbours", "number"), [(0, 16), (1, 15), (8, 8), (16, 1)])
def test_the_first_look_sees_what_others_did_while_we_slept(neighbours: int, number: int) -> None:
    machine = Machine(16)
    machine.neighbours, machine.used = neighbours, [0]
    found = Threads(16, machine.read, machine.used.append)
    found.adapt()
    assert found.number == number


@pytest.mark.parametrize(("load", "number"), [(0.05, 4), (0.3, 4), (0.6, 3), (2.2, 2), (9.5, 1)])
def test_who_needs_little_costs_no_thread(load: float, number: int) -> None:
    machine = Machine(4)
    machine.neighbours = load
    assert settled(machine, 4).number == number


def test_it_looks_four_times_a_second_and_not_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_LOOK_EVERY_S", 0.25)
    machine = Machine(2)
    machine.neighbours = 1
    found = Threads(2, machine.read, machine.used.append)
    machine._now = CPUTime(time.monotonic(), 0.0, 0.0, 2)
    found._before = machine._now
    found.adapt()
    assert machine.used == []
    time.sleep(0.3)
    found.adapt()
    assert machine.used == [1]


def test_the_system_counts_what_we_do() -> None:
    before = read_cpu_time()
    while time.monotonic() < before.clock + 0.5:
        sum(range(1000))
    after = read_cpu_time()
    ours = after.ours - before.ours
    assert 0.05 < ours <= after.clock - before.clock + 0.1
    assert ours - 0.1 < after.all_programs - before.all_programs
    assert after.cores >= 1


@pytest.mark.parametrize(
    "settings", [EngineSettings(threads=2), EngineSettings(fidelity="strict")], ids=str
)
def test_a_number_that_was_asked_for_or_that_bits_hang_on_stays(settings: EngineSettings) -> None:
    assert Threads.chosen(settings, CPU) is None
    assert Threads.chosen(EngineSettings(), torch.device("cuda")) is None
    found = Threads.chosen(EngineSettings(), CPU)
    assert found is not None and found.number == torch.get_num_threads()


def test_a_number_that_was_asked_for_is_used() -> None:
    before = torch.get_num_threads()
    try:
        use_threads(EngineSettings(threads=3))
        assert torch.get_num_threads() == 3
        use_threads(EngineSettings())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
