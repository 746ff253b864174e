"""What reusing documents did, from the rows of a run. Draws nothing, reads no files."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class DocumentTokens:
    """Of answered rows. `exact`: as if nothing had been reused; `uses` of documents and their
    tokens; of rows that ran themselves, `repaired_tokens`, which were stored and computed again all
    the same, and `link_tokens`, which an adapter put into their prompts."""

    modes: tuple[str, ...]
    rows: int
    exact: int
    uses: int
    document_tokens: int
    repaired_tokens: int
    link_tokens: int
    fallback_reason: str | None


def measure_documents(output: pl.LazyFrame) -> DocumentTokens | None:
    """None where prompts are in one piece. `output` is scanned, never loaded whole."""
    names = output.collect_schema().names()
    if not {"reuse_mode", "exact", "repaired_tokens", "link_tokens"} <= set(names):
        return None
    ran = pl.col("dedup_of").is_null()
    found = (
        output.filter(pl.col("status") == "ok")
        .select(
            modes=pl.col("reuse_mode").unique().sort().implode(),
            rows=pl.len(),
            exact=pl.col("exact").sum(),
            uses=pl.col("documents").cast(pl.Int64).sum(),
            document_tokens=pl.col("document_tokens").cast(pl.Int64).sum(),
            repaired_tokens=pl.col("repaired_tokens").filter(ran).cast(pl.Int64).sum(),
            link_tokens=pl.col("link_tokens").filter(ran).cast(pl.Int64).sum(),
            fallback_reason=pl.col("fallback_reason").drop_nulls().first(),
        )
        .collect()
        .row(0, named=True)
    )
    return DocumentTokens(**found | {"modes": tuple(found["modes"])})
