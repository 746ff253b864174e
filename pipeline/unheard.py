"""What a library of Rust prints when it panics, before Python hears of it, reaches nobody.

The panic comes as an exception besides, which is told in a sentence; what is printed names files of
the library's own source, and may quote a row.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDERR = 2


@contextmanager
def panics_unheard() -> Iterator[None]:
    """What is printed to stderr meanwhile comes when it is over, unless a library panicked.

    For calls of milliseconds: whatever else the process prints waits as long.
    """
    try:
        kept = os.dup(_STDERR)
    except OSError:  # there is no stderr to spare
        yield
        return
    with tempfile.TemporaryFile() as held:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        except BaseException:
            held.seek(0)
            if b"panicked at" in held.read():
                held.truncate(0)
            raise
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os.dup2(kept, _STDERR)
            os.close(kept)
            held.seek(0)
            with suppress(OSError):
                os.write(_STDERR, held.read())
