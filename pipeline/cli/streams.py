"""Stdout and stderr of the command: what is written there acts on no terminal and ends no job.

Stdout holds results: what cannot be written there is an error, said once. Stderr holds what is said
meanwhile; a job goes on where nobody can hear it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from pipeline.errors import OutputLost
from pipeline.visible import visible


def prepare_streams() -> None:
    """Before anything is opened: every stream is there and takes every character.

    A closed stream's number would go to the next file that is opened, and a library that prints
    would write into that.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # in a locale without all letters


def write_result(text: str, lines: bool = True) -> None:
    """A line, or lines, on stdout. Raises OutputLost."""
    writing(lambda out: out.write(visible(text, lines) + "\n"))


def writing(write: Callable[[TextIO], object]) -> None:
    """Call `write` with stdout, to its end. Raises OutputLost where that takes no more."""
    try:
        write(sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # or Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputLost(
            f"the result could not be written to stdout ({error.strerror or 'it is closed'})",
            is_unwanted=isinstance(error, BrokenPipeError),
        ) from error


@contextmanager
def result_is_kept(path: object) -> Iterator[None]:
    """What is written meanwhile only tells of what lies at `path`: losing it fails no command."""
    try:
        yield
    except OutputLost as error:
        if not error.is_unwanted:
            say(f"coppice: {error}; nothing else is missing, see {path}")


def say(line: str) -> None:
    """A line on stderr, if that takes one: a job goes on where nobody hears it."""
    with suppress(OSError, ValueError):
        print(visible(line), file=sys.stderr, flush=True)
