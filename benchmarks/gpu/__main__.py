"""`python -m benchmarks.gpu`: see the package."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import choose
from benchmarks.gpu.watch import Journal, Watch


def main(words: Sequence[str] | None = None) -> int:
    """0: every stage ran to its end."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-figures")))
    parser.add_argument("--deadline", type=float, default=520.0, help="seconds for all stages")
    parser.add_argument("--stages", help="comma separated, by default all")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU, small")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        groups = choose(args.stages.split(",") if args.stages else None, dry=args.dry)
    except ValueError as error:
        parser.error(str(error))

    def command(names: Sequence[str], left_s: float) -> list[str]:
        said = ["--out", str(args.out), "--seconds", f"{left_s:.0f}", *(["--dry"] * args.dry)]
        return [sys.executable, "-m", "benchmarks.gpu.child", *said, *names]

    journal = Journal(str(args.out / "gpu.jsonl"))
    watch = Watch(command, journal, time.monotonic() + args.deadline)
    return 0 if watch.run(groups) else 1


if __name__ == "__main__":
    sys.exit(main())
