"""An environment of its own for each peer: `python -m benchmarks.peers.environments [NAME ...]`.

Made below `.bench/environments` from the pinned list beside this file, unless COPPICE_BENCH_VLLM or
COPPICE_BENCH_OPENVINO names a folder that has one already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.scratch import scratch

NAMES = ("vllm", "openvino")
_MARK = ".installed"  # holds the list that was installed; written last


def python_of(name: str) -> Path:
    """The interpreter of a peer, its environment made first if it is absent or out of date.

    Raises RuntimeError, with the end of pip's own message, when it cannot be made.
    """
    given = os.environ.get(f"COPPICE_BENCH_{name.upper()}")
    folder = Path(given) if given else scratch("environments") / name
    python = folder / "bin" / "python"
    if given and not python.exists():
        raise RuntimeError(f"COPPICE_BENCH_{name.upper()} names a folder without bin/python")
    if not given:
        _install(name, folder, python)
    return python


def _install(name: str, folder: Path, python: Path) -> None:
    """torch first, with what it needs: left to a peer's own requirements, it may be another."""
    listed = Path(__file__).with_name(f"{name}.txt")
    mark = folder / _MARK
    if mark.exists() and mark.read_text() == listed.read_text():
        return
    print(f"making the environment of {name} (gigabytes, minutes)", flush=True)
    torch = next(line for line in listed.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([*pip, torch])
    _run([*pip, "--no-deps", "-r", str(listed)])
    mark.write_text(listed.read_text())


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["pip failed"])[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    for name in parser.parse_args().names:
        python_of(name)
        print(f"{name}: ready")


if __name__ == "__main__":
    main()
