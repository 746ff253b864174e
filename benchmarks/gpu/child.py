"""Runs stages in one process and says what they find, a line of JSON for each figure."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_STAGES: Final = {
    "env": "ceilings:environment",
    "kernel": "correctness:kernel",
    "capture": "correctness:capture",
    "engine": "correctness:engine",
    "demo": "jobs:demo",
    "ceilings": "ceilings:ceilings",
    "layer": "layer:layer",
    "step": "step:step",
    "job": "jobs:job",
    "host": "host:host",
    "sampled": "step:sampled",
    "peer": "jobs:peer",
}
"""Where each lies: `file:function`, which takes a `Bench` and the name of a model."""


@dataclass
class Bench:
    """What stages share. `say` adds a figure; `left_s` is how long is left of the whole time."""

    out: Path
    is_dry: bool
    until: float
    stage: str = ""
    _models: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        self.device = torch.device("cpu" if self.is_dry else "cuda")

    def say(self, **row: Any) -> None:
        print(json.dumps({"stage": self.stage} | row, default=str), flush=True)

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def model(self, shape: str) -> Any:
        """A `LoadedModel` with random weights; one at a time has room."""
        from benchmarks.gpu.workload import load_random

        if shape not in self._models:
            self._models.clear()
            self.free()
            self._models[shape] = load_random("tiny" if self.is_dry else shape, self.device)
        return self._models[shape]

    def free(self) -> None:
        """Give back what nobody holds any more."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run(bench: Bench, name: str) -> bool:
    """One stage; its error is a row. Whether the device still works."""
    what, _, argument = name.partition(":")
    bench.stage = name
    begin = time.monotonic()
    try:
        file, _, function = _STAGES[what].partition(":")
        work: Callable[[Bench, str], None] = getattr(
            importlib.import_module(f"benchmarks.gpu.{file}"), function
        )
        work(bench, argument)
    except Exception as error:
        where = traceback.format_exc().splitlines()[-7:]
        bench.say(failed=f"{type(error).__name__}: {str(error)[:300]}", where=where)
    is_sound = _is_sound(bench)
    seconds = round(time.monotonic() - begin, 1)
    bench.say(ends=name, seconds=seconds, **({} if is_sound else {"leaves": True}))
    return is_sound


def _is_sound(bench: Bench) -> bool:
    """After an illegal access nothing works in this process any more."""
    import torch

    try:
        bench.free()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        bench.say(failed=f"the device is lost: {str(error)[:200]}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="left of the whole time")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("stages", nargs="+")
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        from benchmarks.gpu.interpreted import interpret_quickly

        interpret_quickly()
    bench = Bench(args.out, args.dry, time.monotonic() + args.seconds)
    for name in args.stages:
        print(json.dumps({"begins": name}), flush=True)
        if not run(bench, name):
            break


if __name__ == "__main__":
    main()
