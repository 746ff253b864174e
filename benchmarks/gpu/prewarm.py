"""Fills Triton's cache for a card on a machine without one: `TRITON_CACHE_DIR=DIR python -m
benchmarks.gpu.prewarm`. Compiling on the card's own machine would take a minute of its time.

The cache belongs to one version of Triton, one text of the programs and one folder: its paths are
absolute.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from benchmarks.gpu.around import CASES
from benchmarks.gpu.compiled import HOPPER, Variant, compile_variant
from benchmarks.gpu.compiled_steps import compile_steps
from pipeline.engine.kernels.rules import AttentionRules

_HEADS = (
    (torch.float32, (4, 2), 32),
    (torch.bfloat16, (32, 8), 64), (torch.bfloat16, (32, 8), 128), (torch.float32, (4, 2), 64),
    (torch.float16, (32, 8), 128), (torch.bfloat16, (14, 2), 64), (torch.bfloat16, (8, 4), 256),
    (torch.bfloat16, (32, 32), 96), (torch.float32, (32, 8), 128),
)  # fmt: skip


def main() -> None:
    if "TRITON_CACHE_DIR" not in os.environ:
        sys.exit("set TRITON_CACHE_DIR to the folder that is to be carried to the card")
    for dtype, heads, head_dim in _HEADS:
        scale = head_dim**-0.5
        sinks = torch.zeros(heads[0])
        for rules in (AttentionRules(scale), AttentionRules(scale, 100, 20.0, sinks)):
            tiles = (16, 64) if rules.window else (16, 64, 128)
            for tile in tiles if dtype == torch.bfloat16 else (16, 64):
                begin = time.monotonic()
                variant = Variant(dtype, head_dim, tile, rules, heads)
                compile_variant(variant, HOPPER)
                print(f"{variant}: {time.monotonic() - begin:.1f} s", flush=True)
    for sizes in CASES:
        begin = time.monotonic()
        compile_steps(sizes, is_whole=True)
        print(f"{sizes}: {time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
