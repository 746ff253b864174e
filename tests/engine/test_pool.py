"""The pool of the compiled kernels: the same bits as by one thread, whoever is put aside."""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.engine import blocked_linear
from pipeline.engine.blocked_linear import BlockedLinear
from pipeline.engine.kernels import native
from pipeline.engine.threads import pooled

_TGKILL = 234  # of x86-64, the only CPUs that these kernels are for
LAYER = nn.Linear(512, 320).bfloat16().requires_grad_(False)

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None or not blocked_linear.suits(LAYER),
    reason="this CPU has none of these kernels",
)


@pytest.fixture
def layer() -> BlockedLinear:
    return BlockedLinear(LAYER)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()


def alone(layer: BlockedLinear, x: Tensor) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return layer(x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 100, 700])
def test_a_product_has_the_bits_of_one_thread(layer: BlockedLinear, count: int) -> None:
    x = tokens(count)
    with pooled():
        found = layer(x)
    assert torch.equal(found, alone(layer, x))


@pytest.mark.usefixtures("four_threads")
def test_operands_may_go_as_soon_as_a_region_is_over(layer: BlockedLinear) -> None:
    """Four threads on fewer cores: some are still within a region long after its end."""
    for seed in range(300):
        x = tokens(1 + 37 * seed % 400, seed)
        expected = alone(layer, x)
        with pooled():
            found = layer(x)
        x.fill_(torch.nan)
        del x
        assert torch.equal(found, expected), seed


def test_torch_has_its_threads_again_whatever_happens() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), pooled():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("four_threads")
def test_two_callers_at_once_both_get_their_own(layer: BlockedLinear) -> None:
    wrong = []

    def call(seed: int) -> None:
        x = tokens(200, seed)
        torch.set_num_threads(4)
        for _ in range(100):
            with pooled():
                found = layer(x)
            if not torch.equal(found, alone(layer, x)):
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=[seed]) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.usefixtures("four_threads")
def test_a_child_of_fork_has_a_pool_of_its_own(layer: BlockedLinear) -> None:
    x = tokens(200)
    with pooled():
        expected = layer(x)
    child = os.fork()
    if not child:
        with pooled():
            os._exit(0 if torch.equal(layer(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("four_threads")
def test_nobody_waits_for_a_thread_that_is_put_aside(layer: BlockedLinear) -> None:
    """A signal's handler is libc's `sleep`: the thread stays for SIGHUP = 1 second where it is.
    One that is just writing is waited for, which is a small part of the time."""
    x = tokens(2000)
    expected = alone(layer, x)
    with pooled():
        layer(x)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = libc.signal(signal.SIGHUP, ctypes.cast(libc.sleep, ctypes.c_void_p))
    seconds = []
    try:
        for _ in range(9):
            stop = threading.Timer(0.002, put_aside, [libc])
            stop.start()
            begin = time.monotonic()
            for _ in range(5):
                with pooled():
                    found = layer(x)
                assert torch.equal(found, expected)
            seconds.append(time.monotonic() - begin)
            stop.join()
    finally:
        time.sleep(1.1)  # until the last one is back
        libc.signal(signal.SIGHUP, before)
    assert statistics.median(seconds) < 0.5, "it waited for a thread that slept a second"


def put_aside(libc: ctypes.CDLL) -> None:
    """All threads of the pool."""
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text() == "coppice-pool\n":
            libc.syscall(_TGKILL, os.getpid(), int(thread.name), signal.SIGHUP)
