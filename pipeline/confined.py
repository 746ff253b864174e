"""Code that a stranger wrote, run in a process of its own with limits of time and memory.

```
 items ─► child (2 GiB, some seconds for an item) ─► results
             └── ends over an item: `Ended` in its place, and another child for those after it
```
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

MOST_BYTES = 2 << 30
"""Of a child's memory."""
_SIZE_BYTES = 8


@dataclass(frozen=True)
class Fault:
    """Why the function made no text of an item, without quoting it; `is_slow`: it took too long."""

    message: str
    is_slow: bool = False


@dataclass(frozen=True)
class Ended:
    """What comes of an item over which the child ended; `is_slow`: it took too long."""

    is_slow: bool


class NotMade(Exception):
    """There is no function: `make` failed or took too long; the message says how."""


class Confined:
    """A function in a child: what `make(*arguments)` returns there, which makes texts of items.

    `make` is a function of a module; arguments and items can be pickled. What the child says is
    JSON: nothing that a stranger's code could send makes this process do anything. An item over
    which the function works for `seconds` ends the child, as does one that takes all its memory.
    `make` has the same limits: to compile a stranger's code can be to run it.
    """

    def __init__(
        self,
        make: Callable[..., Callable[[Any], str | Fault]],
        arguments: tuple[Any, ...],
        seconds: float,
    ) -> None:
        self._task = (make.__module__, make.__qualname__, arguments, seconds)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make the function, unless it is there. Raises NotMade."""
        with self._lock:
            self._child = self._child or _start(self)

    def map(self, items: Sequence[Any]) -> list[str | Fault | Ended]:
        """The text of each item, or why there is none. Raises NotMade."""
        results: list[str | Fault | Ended] = []
        with self._lock:
            while len(results) < len(items):
                child = self._child = self._child or _start(self)
                results += _ask(child, items[len(results) :])
                if len(results) < len(items):
                    self._child = None
                    results.append(Ended(child.wait() == -signal.SIGALRM))
        return results

    def send_task(self, child: subprocess.Popen[bytes]) -> None:
        """Tell a child what to do. Raises NotMade."""
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, pickle.dumps(self._task))
            reason = json.loads(_read(child.stdout))
        except (EOFError, BrokenPipeError):
            is_slow = child.wait() == -signal.SIGALRM
            reason = f"takes over {self._task[-1]:g} s" if is_slow else "takes all memory"
        if reason is not None:
            raise NotMade(reason)


def _start(owner: Confined) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],  # -P: a folder of the user's may hold a `pipeline`
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


def _ask(child: subprocess.Popen[bytes], items: Sequence[Any]) -> list[str | Fault]:
    """Results of the first items, up to the one over which the child ended."""
    assert child.stdin is not None and child.stdout is not None
    results: list[str | Fault] = []
    with suppress(EOFError, BrokenPipeError):
        # The child reads all of them before it answers.
        _write(child.stdin, pickle.dumps(list(items)))
        while len(results) < len(items):
            said = json.loads(_read(child.stdout))
            results.append(said if isinstance(said, str) else Fault(str(said[0]), bool(said[1])))
    return results


def _write(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(len(content).to_bytes(_SIZE_BYTES, "little") + content)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """Raises EOFError."""
    head = pipe.read(_SIZE_BYTES)
    size = int.from_bytes(head, "little")
    content = pipe.read(size)
    if len(head) < _SIZE_BYTES or len(content) < size:
        raise EOFError
    return content


def main() -> None:
    """The child, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    own, out = sys.stdin.buffer, sys.stdout.buffer
    module, name, arguments, seconds = pickle.loads(_read(own))
    make = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process, within any step
    try:
        function, reason = make(*arguments), None
    except Exception as error:
        function, reason = None, f"cannot be compiled ({type(error).__name__})"
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write(out, json.dumps(reason).encode())
    while True:
        for item in pickle.loads(_read(own)):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            result = function(item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            said = result if isinstance(result, str) else [result.message, result.is_slow]
            _write(out, json.dumps(said).encode())


if __name__ == "__main__":
    with suppress(EOFError):
        main()
