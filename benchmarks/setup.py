"""What all arms of a study have in common, and the options that say it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import cpu_kind
from benchmarks.scratch import ROOT
from benchmarks.shapes import SHAPES, model_folder

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Setup:
    """What all arms have in common. `time_limit_s`: for a process, its start included."""

    shape: str
    dtype: str
    new_tokens: int
    repeats: int
    time_limit_s: float
    workloads: Path
    results: Path

    @property
    def vocabulary_size(self) -> int:
        """Of the model."""
        return int(SHAPES[self.shape]["vocab_size"])

    def model(self) -> str:
        """The folder of the model, made when absent."""
        tokenizer = self.workloads / "tokenizer.json"
        known = tokenizer if tokenizer.exists() else None
        return str(model_folder(self.shape, self.dtype, known))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a `Setup`."""
    parser.add_argument("--shape", default="135M", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="medians over so many rounds")
    parser.add_argument("--time-limit-s", "--time-limit", type=float, default=900.0)
    parser.add_argument("--workloads", type=Path, default=ROOT.parent / "shared" / "workloads")
    parser.add_argument("--results", type=Path, default=RESULTS / cpu_kind())


def setup_of(args: argparse.Namespace) -> Setup:
    """From the options of `add_options`."""
    names = Setup.__dataclass_fields__
    return Setup(**{name: value for name, value in vars(args).items() if name in names})
