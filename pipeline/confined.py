"""Code that a stranger wrote, run in a process of its own with limits of time and memory.

```
 items ─► child (2 GiB, some seconds for an item) ─► results
             └── ends over an item: `Ended` in its place, and another child for those after it
```
"""

from __future__ import annotations

import importlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

MOST_BYTES = 2 << 30
"""Of a child's memory."""
_SIZE_BYTES = 8


@dataclass(frozen=True)
class Ended:
    """What comes of an item over which the child ended; `is_slow`: it took too long."""

    is_slow: bool


class Confined:
    """A function in a child: what `make(*arguments)` returns there.

    `make` is a function of a module; arguments, items and results can be pickled. An item over
    which the function works for `seconds` ends the child, as does one that takes all its memory.
    """

    def __init__(
        self, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], seconds: float
    ) -> None:
        self._task = (make.__module__, make.__qualname__, arguments, seconds)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def map(self, items: Sequence[Any]) -> list[Any]:
        """The result of each item, or `Ended`."""
        results: list[Any] = []
        with self._lock:
            while len(results) < len(items):
                child = self._child = self._child or _start(self)
                results += _ask(child, items[len(results) :])
                if len(results) < len(items):
                    self._child = None
                    results.append(Ended(child.wait() == -signal.SIGALRM))
        return results

    def send_task(self, child: subprocess.Popen[bytes]) -> None:
        """Tell a child what to do. Raises RuntimeError if it cannot."""
        assert child.stdin is not None and child.stdout is not None
        _write(child.stdin, self._task)
        if _read(child.stdout) != "ready":
            raise RuntimeError("the process for templates does not start")


def _start(owner: Confined) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what it says may quote a row
        env=environment,
    )
    weakref.finalize(owner, _stop, child)
    owner.send_task(child)
    return child


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def _ask(child: subprocess.Popen[bytes], items: Sequence[Any]) -> list[Any]:
    """Results of the first items, up to the one over which the child ended."""
    assert child.stdin is not None and child.stdout is not None
    results: list[Any] = []
    try:
        _write(child.stdin, list(items))  # the child reads all of them before it answers
        while len(results) < len(items):
            results.append(_read(child.stdout))
    except (EOFError, BrokenPipeError):
        pass
    return results


def _write(pipe: IO[bytes], value: Any) -> None:
    content = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    pipe.write(len(content).to_bytes(_SIZE_BYTES, "little") + content)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    """Raises EOFError."""
    head = pipe.read(_SIZE_BYTES)
    size = int.from_bytes(head, "little")
    content = pipe.read(size)
    if len(head) < _SIZE_BYTES or len(content) < size:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """The child, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    own, out = sys.stdin.buffer, sys.stdout.buffer
    module, name, arguments, seconds = _read(own)
    function = getattr(importlib.import_module(module), name)(*arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write(out, "ready")
    while True:
        for item in _read(own):
            signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process, within any step
            result = function(item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(out, result)


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        pass
