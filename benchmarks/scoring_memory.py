"""Peak memory of scoring, by the number of choices of a row: a process of its own for each.

`python -m benchmarks.scoring_memory CHOICES` prints that of one process as JSON, in MB: resident
before the first request, the most afterwards, and of that the room that KV took.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.scratch import ROOT
from benchmarks.setup import Setup, add_options, setup_of
from kvcoppice.evaluation.evaluator import Request

CHOICES = (4, 400, 4000)
_ROWS, _SHOTS, _QUESTION, _CHOICE = 4, 400, 60, 4  # tokens of each part


def peaks(setup: Setup, choices: Sequence[int] = CHOICES) -> dict[str, Any]:
    """By number of choices."""
    found = {}
    for count in choices:
        command = [sys.executable, "-m", "benchmarks.scoring_memory", str(count)]
        options = ["--shape", setup.shape, "--dtype", setup.dtype]
        paths = ["--workloads", str(setup.workloads)]
        done = subprocess.run(
            [*command, *options, *paths], cwd=ROOT, capture_output=True, text=True,
            timeout=setup.time_limit_s,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found[str(count)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{count:6} choices a row {found[str(count)]}", flush=True)
    return found


def wide_rows(choices: int, vocabulary_size: int) -> list[Request]:
    """Random ids; the shots are the same in all rows."""
    draw = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return draw.integers(0, vocabulary_size, count).astype(np.uint32)

    shots = ids(_SHOTS)
    contexts = [np.concatenate([shots, ids(_QUESTION)]) for _ in range(_ROWS)]
    return [Request(context, ids(_CHOICE)) for context in contexts for _ in range(choices)]


def most_resident() -> int:
    """Bytes, of this process since it began. `ru_maxrss` would count who started it."""
    said = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", said)
    assert found is not None, said
    return int(found[1]) * 1024


def main() -> None:
    from benchmarks.scoring_arms import Ours

    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("choices", type=int)
    setup = setup_of(args := parser.parse_args())
    ours = Ours(setup)
    ours.score(wide_rows(2, setup.vocabulary_size))
    before = psutil.Process().memory_info().rss / 1e6
    scored = ours.score(wide_rows(args.choices, setup.vocabulary_size))
    peak = most_resident() / 1e6
    print(json.dumps({
        "before_mb": before, "peak_mb": peak, "kv_mb": ours.peak_kv_mb,
        "computed": scored.computed, "seconds": scored.seconds,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
