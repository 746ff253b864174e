"""A step of decoding over shared documents, one layer: by views, or with a copy for each row.

`python -m benchmarks.views`; medians of calls that take turns, milliseconds. No model is loaded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine.kernels import native
from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.native_kernel import NativeKernel
from pipeline.engine.kernels.rules import AttentionRules, KVSpans
from pipeline.engine.kernels.torch_kernel import TorchKernel

_KV_HEADS, _REP, _HEAD_DIM = 3, 3, 64
_OWN_TOKENS = 20
_CALLS = 15


@dataclass(frozen=True)
class Table:
    """`rows` that each see `documents` of `tokens` tokens, of `distinct` ones."""

    rows: int
    documents: int
    tokens: int
    distinct: int

    @property
    def length(self) -> int:
        """Of a row."""
        return self.documents * self.tokens + _OWN_TOKENS

    def name(self) -> str:
        uses = self.rows * self.documents // self.distinct
        return f"{self.rows} x {self.documents} documents of {self.tokens}, {uses} uses each"


TABLES = (
    Table(64, 8, 256, 16), Table(64, 8, 256, 64), Table(64, 8, 256, 512),
    Table(64, 8, 64, 16), Table(64, 8, 64, 64), Table(64, 8, 64, 512), Table(64, 8, 16, 64),
)  # fmt: skip


def step(
    kernel: AttentionKernel, slots: int, spans: KVSpans, positions: NDArray[np.int64],
    owner: NDArray[np.int64] | None, dtype: torch.dtype,
) -> Callable[[], Tensor]:  # fmt: skip
    """A call that attends once, over random keys and values."""
    keys, values = torch.randn(2, _KV_HEADS, slots, _HEAD_DIM).to(dtype)
    query = torch.randn(len(positions), _KV_HEADS * _REP, _HEAD_DIM).to(dtype)
    work, rules = kernel.prepare(spans, positions, owner), AttentionRules(_HEAD_DIM**-0.5)
    return lambda: kernel.attend(query, keys, values, work, rules)


def by_copies(table: Table, kernel: AttentionKernel, dtype: torch.dtype) -> Callable[[], Tensor]:
    rows, width = np.arange(table.rows), table.length
    spans = np.stack([rows, rows + 1, rows * width, (rows + 1) * width, rows * 0], 1)
    positions = np.full(table.rows, width - 1)
    return step(kernel, table.rows * width, spans, positions, None, dtype)


def by_views(table: Table, kernel: AttentionKernel, dtype: torch.dtype) -> Callable[[], Tensor]:
    draw, rows, number = np.random.default_rng(0), np.arange(table.rows), np.arange(table.distinct)
    seen = np.stack([draw.permutation(table.distinct)[: table.documents] for _ in rows]).ravel()
    order = np.argsort(seen, kind="stable")
    shift = np.tile(np.arange(table.documents) * table.tokens, table.rows)[order]
    owner = np.concatenate([rows, np.repeat(rows, table.documents)[order]])
    positions = table.length - 1 - np.concatenate([rows * 0, shift])
    count = np.bincount(seen, minlength=table.distinct)
    stop = table.rows + np.cumsum(count)
    first = number * table.tokens
    documents = np.stack([stop - count, stop, first, first + table.tokens, number * 0], 1)
    own = table.distinct * table.tokens + rows * _OWN_TOKENS
    start = np.full(table.rows, table.length - _OWN_TOKENS)
    spans = np.concatenate(
        [np.stack([rows, rows + 1, own, own + _OWN_TOKENS, start], 1), documents[count > 0]]
    )
    slots = table.distinct * table.tokens + table.rows * _OWN_TOKENS
    return step(kernel, slots, spans, positions, owner, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kernel", default="native", choices=["native", "torch"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    kernel: AttentionKernel = TorchKernel(torch.device("cpu"))
    if args.kernel == "native":
        reason = native.why_unavailable()
        assert reason is None, reason
        kernel = NativeKernel(_KV_HEADS * _REP, _KV_HEADS)
    print(f"{args.kernel}, {args.dtype}, {torch.get_num_threads()} threads")
    for table in TABLES:
        ways = {"copies": by_copies(table, kernel, dtype), "views": by_views(table, kernel, dtype)}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_CALLS):
            for name, call in ways.items():
                begin = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - begin) * 1e3)
        copies, views = (statistics.median(taken[name]) for name in ways)
        print(f"{table.name():42} copies {copies:6.2f}  views {views:6.2f}  {copies / views:.2f}")


if __name__ == "__main__":
    main()
