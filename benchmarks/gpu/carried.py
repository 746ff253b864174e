"""How much goes to the card's machine: the tracked files, wheels and Triton's cache, below 64 MiB.

`python -m benchmarks.gpu.carried FOLDER`; exits with 1 where it is more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.scratch import ROOT

MOST_BYTES = 64 << 20


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files, and of all files in folders; links count as nothing."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())
    return total


def tracked_files() -> list[Path]:
    """What git would bring of the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in said.split("\0") if name and (path := ROOT / name).exists()]


def main(folders: list[str]) -> int:
    sizes = {"tracked files": size_of(tracked_files())}
    sizes |= {folder: size_of([Path(folder)]) for folder in folders}
    for name, size in sizes.items():
        print(f"{name}: {size / 2**20:.1f} MiB")
    total = sum(sizes.values())
    print(f"in all: {total / 2**20:.1f} of {MOST_BYTES >> 20} MiB")
    return int(total > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
