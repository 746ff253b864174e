"""Whether a file may be written where somebody else's could be. Knows what files begin with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.location import Location


def check_replaceable(path: Path, beginnings: Sequence[bytes], option: str) -> None:
    """Raises UsageError if there is a file that is neither empty nor begins as ours do.

    What this reads decides alone, so an input is safe however it is named.
    """
    try:
        with path.open("rb") as file:
            head = file.read(max(map(len, beginnings), default=1))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}); see {option}") from None
    if head and not any(map(head.startswith, beginnings)):
        raise UsageError(
            f"{path} is there and holds something else; move it away or choose another {option}"
        )


def folder_to_write(folder: Path) -> tuple[Path, str | None]:
    """The deepest part of `folder` that is there, and why nothing can be made in it, if so."""
    there = folder.absolute()
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        return there, f"{there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return there, f"you may not write to {there}"
    return there, None


def check_apart(source: Location, output: Location) -> None:
    """Raises UsageError if a run would be written into the very folder that its rows are in."""
    if source.canonical == output.canonical:
        inside = f"{str(output).rstrip('/')}/out"
        raise UsageError(f"{output} is the input; choose another -o, like {inside}")
