"""Which rows are audited. Knows columns of the output; never sees a model, a prompt or an answer.

In this order, until `size` rows are chosen:

1. one row of every prefix group, a row that reused the prefix if there is one: a bad prefix spoils
   all its rows and only those (groups are covered even when there are more of them than `size`);
2. half of what is left: in turn from each stratum of reuse depth x length x first or later;
3. the rest: in turn from each embedding cluster of a bounded pool, so that the variety of prompts
   is covered; without an encoder at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

POOL_ROWS: Final = 512
_MAX_CLUSTERS: Final = 64

Embed = Callable[[Sequence[int]], NDArray[np.float32]]
"""Vectors of the prompts of these `row_index` values: float32 [rows, dimensions]."""

CANDIDATE_COLUMNS: Final = (
    "id", "row_index", "group_id", "reuse_depth", "prompt_tokens", "completion_tokens",
    "finish_reason", "cached_tokens",
)  # fmt: skip


def candidate_rows(output: pl.LazyFrame) -> pl.DataFrame:
    """The rows of a run that can be audited: answered, and not copied from another row's answer."""
    answered = (pl.col("status") == "ok") & pl.col("dedup_of").is_null()
    return output.filter(answered).select(CANDIDATE_COLUMNS).collect()


def choose_rows(
    rows: pl.DataFrame, size: int, seed: int, embed: Embed | None = None
) -> pl.DataFrame:
    """Choose about `size` of `rows` (as from `candidate_rows`), sorted by `row_index`.

    The same rows in any order, with the same seed and vectors, give the same choice. More than
    `size` rows come back only where there are more groups than that.
    """
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    left = rows.sort("row_index").with_columns(_order=pl.Series(shuffled, dtype=pl.Int64))
    chosen = _one_of_each_group(left)
    left = left.join(chosen, on="row_index", how="anti")
    room = max(0, size - len(chosen))
    by_stratum = _take_in_turn(left, _stratum(left), -(-room // 2))
    left = left.join(by_stratum, on="row_index", how="anti")
    room -= len(by_stratum)
    rest = _take_rest(left, room, seed, embed) if room else left.clear()
    return pl.concat([chosen, by_stratum, rest]).drop("_order").sort("row_index")


def _one_of_each_group(rows: pl.DataFrame) -> pl.DataFrame:
    grouped = rows.filter(pl.col("group_id").is_not_null())
    preferred = grouped.sort(pl.col("cached_tokens") == 0, "_order")
    return preferred.unique("group_id", keep="first", maintain_order=True)


def _stratum(rows: pl.DataFrame) -> NDArray[np.int64]:
    """[rows] a number for each (reuse depth, length, first or later); sizes in powers of four."""
    length = rows["prompt_tokens"] + rows["completion_tokens"]
    depth_bin = np.ceil(np.log2(1 + rows["reuse_depth"].to_numpy()) / 2)
    length_bin = np.ceil(np.log2(1 + length.to_numpy()) / 2)
    is_later = rows["cached_tokens"].to_numpy() > 0
    return np.asarray(depth_bin * 64 + length_bin * 2 + is_later, np.int64)


def _take_in_turn(rows: pl.DataFrame, label: NDArray[np.int64], count: int) -> pl.DataFrame:
    """`count` rows: one of each label, labels in random order, then a second of each, and so on."""
    turn = pl.col("_order").rank("ordinal").over("_label")
    labelled = rows.with_columns(_label=pl.Series(label, dtype=pl.Int64))
    ordered = labelled.with_columns(_turn=turn).sort("_turn", "_order")
    return ordered.head(count).drop("_label", "_turn")


def _take_rest(rows: pl.DataFrame, count: int, seed: int, embed: Embed | None) -> pl.DataFrame:
    shuffled = rows.sort("_order")
    pool = shuffled.head(POOL_ROWS)
    if embed is None or count >= len(pool):
        return shuffled.head(count)
    vectors = embed(pool["row_index"].to_list())
    return _take_in_turn(pool, _cluster(vectors, min(count, _MAX_CLUSTERS), seed), count)


def _cluster(vectors: NDArray[np.float32], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """FAISS k-means: [rows, dimensions] -> [rows] cluster of each row."""
    import faiss

    points = np.ascontiguousarray(vectors, np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # the order of sums, and so the clusters, must not depend on cores
    try:
        kmeans = faiss.Kmeans(
            points.shape[1],
            num_clusters,
            niter=20,
            seed=seed % 2**31,
            min_points_per_centroid=1,
            verbose=False,
        )
        kmeans.train(points)
        _, nearest = kmeans.assign(points)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(nearest, np.int64)
