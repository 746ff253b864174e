"""What the KV store costs: `python -m benchmarks.recycle_store [--prompts 100000] [--tokens 900]`.

Two stores below the scratch folder. The wide one holds many prompts of 300 tokens that share their
beginnings as a nightly file's do, with the smallest KV there is: opening (with the index, and from
the entries alone) and `match`; beside it the nearest of as many sentence embeddings. The deep one
holds single prompts in the shape of DialoGPT-medium: `put` and `load`, each load up to the copy
into memory of the engine's own. Beside the loads stands what the machine can do: the same bytes by
read() from the page cache and from the disk.

Cold means that the kernel was told to forget the file; a host that caches its guests' disks may
still know it. Prints one JSON line and writes it to results/recycle_store.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.machine import describe_machine
from benchmarks.scratch import scratch
from pipeline.experiment.retrieval import EmbeddingIndex, Vectors
from pipeline.kvstore.folder import StoreFolder
from pipeline.kvstore.identity import Identity, TokenIds, entry_key
from pipeline.kvstore.store import KVStore

_INSTRUCTIONS, _DOCUMENT_ROWS = 20, 5
_LENGTHS = (180, 90, 30)  # instruction, document, the row's own
_VOCABULARY = 32_768
_QUERIES = 20_000
_DIMENSIONS, _SEARCHES = 384, 1_000  # of all-MiniLM-L6-v2
_LAYOUT = (24, 16, 64)  # DialoGPT-medium: 196,608 bytes a token in fp32
_BUDGET = 1 << 40
WIDE = Identity("bench", "bench", "float16", (1, 1, 1), "{}")
DEEP = Identity("bench", "bench", "float32", _LAYOUT, "{}")


def prompt(row: int) -> TokenIds:
    """Token ids of one row, a function of its number; rows share instructions and documents."""
    document = row // _DOCUMENT_ROWS
    seeds = (document % _INSTRUCTIONS, 10_000 + document, 10_000_000 + row)
    parts = zip(seeds, _LENGTHS, strict=True)
    return np.concatenate(
        [np.random.default_rng(seed).integers(0, _VOCABULARY, n, np.uint32) for seed, n in parts]
    )


@contextmanager
def unflushed() -> Iterator[None]:
    """While a store is filled, nothing is flushed: 100,000 times would take an hour of waiting."""
    real = os.fsync
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        os.fsync = real


def fill(store: KVStore, prompts: int) -> None:
    """Put every prompt; nothing is computed, so the KV is all the same number."""
    kv = torch.ones(1, 2, 1, sum(_LENGTHS), 1, dtype=torch.float16)
    for row in range(prompts):
        ids = prompt(row)
        assert store.put(ids, 0, kv)


def measure_wide(folder: Path, prompts: int) -> dict[str, float]:
    """Fill, open twice, match."""
    shutil.rmtree(folder, ignore_errors=True)
    with unflushed(), KVStore.open(folder, WIDE, _BUDGET) as store:
        fill_s = timed(lambda: fill(store, prompts))
    open_s = timed(lambda: KVStore.open(folder, WIDE, _BUDGET).close())
    (folder / "index.safetensors").unlink()
    rebuild_s = timed(lambda: KVStore.open(folder, WIDE, _BUDGET).close())
    with KVStore.open(folder, WIDE, _BUDGET) as store:
        times = np.array(list(match_times(store, prompts)))
    searches = np.array(list(search_times(prompts)))
    return {
        "prompts": prompts,
        "put_s_each_unflushed": fill_s / prompts,
        "open_s": open_s,
        "open_without_index_s": rebuild_s,
        "match_median_s": float(np.median(times)),
        "match_p99_s": float(np.quantile(times, 0.99)),
        "match_max_s": float(times.max()),
        "nearest_median_s": float(np.median(searches)),
        "nearest_p99_s": float(np.quantile(searches, 0.99)),
    }


def match_times(store: KVStore, prompts: int) -> Iterator[float]:
    """Seconds of single lookups: stored prompts with other ends, and prompts that none is like."""
    draw = np.random.default_rng(1)
    for row in draw.integers(0, prompts, _QUERIES).tolist():
        ids = prompt(row)
        cut = int(draw.integers(0, len(ids)))
        ids[cut:] = draw.integers(0, _VOCABULARY, len(ids) - cut)
        begin = time.perf_counter()
        found = store.match(ids)
        yield time.perf_counter() - begin
        assert found >= cut, (found, cut)


class NearAgain:
    """In the place of an encoder: the text "7" gets prompt 7's vector, a little off."""

    name = "drawn"

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors
        self._draw = np.random.default_rng(3)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """[texts, dimensions], of unit length."""
        exact = self._vectors[list(map(int, texts))]
        return unit(exact + 0.02 * self._draw.standard_normal(exact.shape, np.float32))


def search_times(prompts: int) -> Iterator[float]:
    """Seconds of finding the nearest of so many vectors; the encoder's own time is not in it."""
    draw = np.random.default_rng(2)
    vectors = unit(draw.standard_normal((prompts, _DIMENSIONS), np.float32))
    index = EmbeddingIndex(NearAgain(vectors), vectors)
    for key in draw.integers(0, prompts, _SEARCHES).tolist():
        found = index.nearest(str(key))
        assert found.key == key, (found, key)
        yield found.search_s


def unit(vectors: Vectors) -> Vectors:
    """Each row divided by its length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure_deep(folder: Path, tokens: int, repeats: int) -> dict[str, float]:
    """Put and load single prompts; rates in bytes of KV a second, medians."""
    shutil.rmtree(folder, ignore_errors=True)
    draw = torch.Generator().manual_seed(0)
    kv = torch.randn(_LAYOUT[0], 2, _LAYOUT[1], tokens, _LAYOUT[2], generator=draw)
    ids = [np.full(tokens, row, np.uint32) for row in range(repeats)]
    size = kv.numel() * 4
    with KVStore.open(folder, DEEP, _BUDGET) as store:
        put_s = [timed(partial(store.put, row, 0, kv)) for row in ids]
    place, root = StoreFolder(folder), DEEP.root("", "")
    files = [(place.entry_path(entry_key(root, row, 0)), row) for row in ids]
    arena = torch.zeros_like(kv)
    buffer = memoryview(bytearray(size))
    seconds: dict[str, list[float]] = {}

    def note(name: str, action: Callable[[], object]) -> None:
        seconds.setdefault(name, []).append(timed(action))

    for path, row in files:
        forget(path)
        note("read_cold", partial(read, path, buffer))
        note("read_cached", partial(read, path, buffer))
        with KVStore.open(folder, DEEP, _BUDGET) as store:
            note("load_first", partial(load, store, row, arena))
            note("load_again", partial(load, store, row, arena))
        assert torch.equal(arena, kv)
        forget(path)
        with KVStore.open(folder, DEEP, _BUDGET) as store:
            note("load_cold", partial(load, store, row, arena))
    found = {f"{name}_bytes_per_s": size / median(values) for name, values in seconds.items()}
    return {
        "tokens": tokens,
        "kv_bytes": size,
        "put_bytes_per_s": size / median(put_s),
        **found,
        "load_first_of_cached": found["load_first_bytes_per_s"] / found["read_cached_bytes_per_s"],
        "load_again_of_cached": found["load_again_bytes_per_s"] / found["read_cached_bytes_per_s"],
        "load_cold_of_cold": found["load_cold_bytes_per_s"] / found["read_cold_bytes_per_s"],
    }


def load(store: KVStore, ids: TokenIds, arena: torch.Tensor) -> None:
    """Into the engine's memory."""
    kv = store.load(ids, 0, len(ids))
    assert kv is not None
    arena.copy_(kv)


def read(path: Path, buffer: memoryview) -> None:
    """By read() into memory that is there already: as fast as this machine gives a file."""
    file = os.open(path, os.O_RDONLY)
    place = 0
    while taken := os.preadv(file, [buffer[place:]], place):
        place += taken
    os.close(file)


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    base = scratch("recycle_store")
    line = {
        "machine": describe_machine(),
        "wide": measure_wide(base / "wide", args.prompts),
        "deep": measure_deep(base / "deep", args.tokens, args.repeats),
    }
    shutil.rmtree(base)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "recycle_store.jsonl").write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
