"""Every error that coppice raises on purpose; `exit_code` is that of the command."""

from __future__ import annotations

import traceback
from pathlib import Path

from pipeline.visible import visible


class CoppiceError(Exception):
    """Base of all. The message is one sentence for a person: what, where, and the remedy.

    It may name what others wrote, so nothing of it acts on a terminal, a log or a page.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(visible(message))


class UsageError(CoppiceError):
    """The call or its configuration cannot work."""

    exit_code = 2


class InputError(UsageError):
    """The prompt file is missing, damaged or of the wrong shape."""


class NoInput(InputError):
    """There is no file or no row at all; a night may be told to skip."""


class ModelError(UsageError):
    """The model is missing, partial, unsafe or not supported."""


class RunDirectoryError(UsageError):
    """The output folder is in use or belongs to another job."""


class FolderInUse(RunDirectoryError):
    """Another process holds it; wait until that one ends. `owner`: how a lock calls it."""

    def __init__(self, message: str, owner: str = "another process") -> None:
        super().__init__(message)
        self.owner = owner


class EngineError(CoppiceError):
    """The device computed something wrong or ran out of room."""


class OutputLost(CoppiceError):
    """Stdout takes no more. `is_unwanted`: whoever read it has gone, as `head` does."""

    def __init__(self, message: str = "", is_unwanted: bool = False) -> None:
        super().__init__(message)
        self.is_unwanted = is_unwanted


class StorageError(CoppiceError):
    """A part could not be written, or a committed one was altered."""


class Stalled(CoppiceError):
    """Nothing moved for `--stall-timeout`; the same command resumes."""


class TooManyFailedRows(CoppiceError):
    """Finished, but more rows failed than `--fail-on-error` allows."""

    exit_code = 3


class TooManyDegenerate(CoppiceError):
    """Finished, but more turns repeat themselves than `--max-degenerate` allows."""

    exit_code = 4


class AuditFailed(CoppiceError):
    """The audit is below its bar."""

    exit_code = 4


class DocumentsDisagree(CoppiceError):
    """Answers over reused documents are too far from those of full attention."""

    exit_code = 4


class TimeBudgetReached(CoppiceError):
    """Stopped by `--time-budget`; the same command resumes."""

    exit_code = 75


class Interrupted(CoppiceError):
    """Stopped by a signal; the same command resumes."""

    exit_code = 130


def install_extra(extra: str) -> str:
    """How to get an optional part of coppice, for a message. It is on no package index yet."""
    return f"in a checkout of coppice run: pip install -e '.[{extra}]'"


def place_of(error: BaseException) -> str:
    """Type and place of a fault of ours. Its message is left out: it may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"


def is_row_fault(error: BaseException) -> bool:
    """Whether a row may be to blame, and not the whole job or who stops it.

    A panic of Rust is no Exception, and has no name that could be imported.
    """
    if type(error).__module__ == "pyo3_runtime":
        return True
    return isinstance(error, Exception) and not isinstance(error, CoppiceError)
