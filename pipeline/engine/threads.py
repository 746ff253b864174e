"""Threads of a CPU, and what becomes of them beside other programs.

A decode step has some 200 parallel regions, and with OpenMP each of them ends when its slowest
thread does. Where there are more threads than free cores, one of them always waits for a core:
beside one busy process, two threads on two cores took 3 to 15 times as long as on a quiet machine
(issue 17). Regions of the compiled kernels run on a pool that waits for no such thread (`pooled`,
`kernels/pool.h`). Where torch computes, there are as many threads as others leave cores free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

from pipeline.settings import EngineSettings

_LOOK_EVERY_S = 0.25  # the system counts time in hundredths of a second
_FULL = 0.9  # of the time of all cores: more is wanted than there is
_TOLERATED = 0.4  # of a core: what others may use before a thread makes room for them


class CPUTime(NamedTuple):
    """Seconds since some moment: of the clock, of this machine's `cores`, and of this process."""

    clock: float
    all_programs: float
    ours: float
    cores: int


def read_cpu_time() -> CPUTime:
    """What the system has counted; of the cores that this process may use, where that is known."""
    process, cores = psutil.Process(), psutil.cpu_times(percpu=True)
    allowed = process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(len(cores))
    used = [cores[number] for number in allowed if number < len(cores)]
    own = process.cpu_times()
    return CPUTime(time.monotonic(), sum(map(_busy, used)), own.user + own.system, len(used))


def _busy(core: NamedTuple) -> float:
    """Seconds of one core in which it did something, for us, for others, or for another machine
    on the same hardware."""
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is the user's as well
    return float(sum(spent for name, spent in core._asdict().items() if name not in idle))


class Threads:
    """The threads of this process's matrix products, between `most` and one."""

    def __init__(
        self,
        most: int,
        read: Callable[[], CPUTime] = read_cpu_time,
        use: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        """`use`: has so many threads compute, in the thread that calls it."""
        self.number = most
        self._most = self._applied = most
        self._read = read
        self._use = use
        self._before = read()

    @classmethod
    def chosen(cls, settings: EngineSettings, device: torch.device) -> Threads | None:
        """None where the number stays: it was asked for, or the bits of strict mode hang on it."""
        if device.type != "cpu" or settings.threads or settings.fidelity == "strict":
            return None
        return cls(torch.get_num_threads())

    def adapt(self) -> None:
        """Before a step: so many threads as others left free since the last look. Costs nothing
        most times. The first look of a run tells what others did while it was prepared."""
        if time.monotonic() - self._before.clock >= _LOOK_EVERY_S:
            self.number = self._look()
        self._apply(self.number)

    def restore(self) -> None:
        """All of them again, until the next step."""
        self._apply(self._most)

    def _look(self) -> int:
        now, before = self._read(), self._before
        self._before = now
        seconds = now.clock - before.clock
        busy = (now.all_programs - before.all_programs) / seconds
        wanted = others = busy - (now.ours - before.ours) / seconds
        if busy > _FULL * now.cores:  # a fair scheduler cuts what each of us gets alike
            wanted *= max(1.0, self.number / max(now.cores - others, 0.01))
        return max(1, min(self._most, int(now.cores - wanted + _TOLERATED)))

    def _apply(self, number: int) -> None:
        if number != self._applied:
            self._applied = number
            self._use(number)


@contextmanager
def pooled() -> Iterator[None]:
    """Compiled kernels run on their own pool, of as many threads as torch has.

    torch has one meanwhile: the others would wait for work on the cores of the pool.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.ops.coppice.use_pool(threads)
    try:
        yield
    finally:
        torch.ops.coppice.use_pool(0)
        torch.set_num_threads(threads)


def use_threads(settings: EngineSettings) -> None:
    """Have as many threads compute as was asked for, in the thread that calls this."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
