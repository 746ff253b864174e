"""The experiment's rows as tables, and the paper's summary of them. Knows no model and no file.

Of a model with random weights no output is shown: its tokens are compared, its words mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any, Final

import numpy as np

from pipeline.experiment.experiment import BASELINE, EMBEDDING, NAIVE, ArmRow
from pipeline.experiment.protocol import median_interval, speedup_interval
from pipeline.experiment.retrieval import TextEncoder

Row = dict[str, Any]
Reader = Callable[[Sequence[int]], str]

PAPER: Final[Row] = {
    "arm": "the paper", "prompts": 6, "hits": 6, "reused_tokens": 38,
    "speedup_with_cache": 46.46, "speedup_without": None, "output_similarity": 0.594,
    "token_similarity": None, "identical": None, "right_answers": None,
    "prompt_similarity": 0.819, "baseline_s": 0.221, "latency_s": 0.108,
}  # fmt: skip


def baseline_table(rows: Sequence[ArmRow], read: Reader | None) -> list[Row]:
    """`baseline.csv`: one row a prompt."""
    return [
        _place(row) | {"new_tokens": len(row.first.token_ids), "output": _text(row, read)}
        | _latency(row)
        for row in rows
        if row.arm == BASELINE
    ]  # fmt: skip


def recycled_table(rows: Sequence[ArmRow], read: Reader | None, encoder: TextEncoder) -> list[Row]:
    """`recycled.csv`: one row a prompt and arm, with what was reused and what came of it."""
    base = {row.prompt.id: row for row in rows if row.arm == BASELINE}
    others = [row for row in rows if row.arm != BASELINE]
    cosines = _cosines(others, base, read, encoder)
    return [
        {"arm": row.arm} | _place(row) | {
            "source": row.first.found.source,
            "prompt_similarity": row.first.found.similarity,
            "reused_tokens": row.first.reused,
            "identical": row.first.token_ids == base[row.prompt.id].first.token_ids,
            "token_similarity": _likeness(row, base[row.prompt.id]),
            "output_similarity": cosine,
            "route": row.first.route,
            "output": _text(row, read),
        } | _latency(row) | _parts(row)
        for row, cosine in zip(others, cosines, strict=True)
    ]  # fmt: skip


def comparison_table(rows: Sequence[ArmRow]) -> list[Row]:
    """`comparison.csv`: both tables merged by prompt, with the speedup and its interval."""
    base = {row.prompt.id: row for row in rows if row.arm == BASELINE}
    return [_merged(row, base[row.prompt.id]) for row in rows if row.arm != BASELINE]


def _merged(row: ArmRow, base: ArmRow) -> Row:
    speedup = speedup_interval(_seconds(base), _seconds(row))
    return _place(row) | {
        "arm": row.arm,
        "reused_tokens": row.first.reused,
        "baseline_s": median_interval(_seconds(base)).median,
        "latency_s": median_interval(_seconds(row)).median,
        "speedup_percent": speedup.median,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "identical": row.first.token_ids == base.first.token_ids,
    }


def summary_table(rows: Sequence[ArmRow], read: Reader | None, encoder: TextEncoder) -> list[Row]:
    """The paper's summary, an arm a row. Means over prompts, as there; of medians over trials."""
    recycled, merged = recycled_table(rows, read, encoder), comparison_table(rows)
    pairs = list(zip(recycled, merged, strict=True))
    arms = list(dict.fromkeys(row["arm"] for row in recycled))
    read_arms = [_summarise(arm, [p for p in pairs if p[0]["arm"] == arm]) for arm in arms]
    right = _count_right(rows, read)
    asked = sum(row.arm == BASELINE for row in rows)
    return [arm | {"prompts": asked, "right_answers": right.get(arm["arm"])} for arm in read_arms]


def _summarise(arm: str, pairs: Sequence[tuple[Row, Row]]) -> Row:
    hits = [pair for pair in pairs if pair[0]["reused_tokens"]]
    misses = [merged for row, merged in pairs if not row["reused_tokens"]]
    found = [row for row, _ in hits]
    return {
        "arm": arm,
        "hits": len(hits),
        "reused_tokens": sum(row["reused_tokens"] for row in found),
        "speedup_with_cache": _mean(merged["speedup_percent"] for _, merged in hits),
        "speedup_without": _mean(merged["speedup_percent"] for merged in misses),
        "output_similarity": _mean(row["output_similarity"] for row in found),
        "token_similarity": _mean(row["token_similarity"] for row in found),
        "identical": sum(row["identical"] for row in found),
        "prompt_similarity": _mean(row["prompt_similarity"] for row in found),
        "baseline_s": _mean(merged["baseline_s"] for _, merged in hits),
        "latency_s": _mean(merged["latency_s"] for _, merged in hits),
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _count_right(rows: Sequence[ArmRow], read: Reader | None) -> dict[str, str]:
    """`right of known` among the prompts that the embedding route hits, where answers are known."""
    hits = {row.prompt.id for row in rows if row.arm == EMBEDDING and row.first.reused}
    counts: dict[str, list[bool]] = {}
    for row in rows:
        if row.prompt.answer and read is not None and row.prompt.id in hits:
            is_right = read(row.first.token_ids).strip() == row.prompt.answer
            counts.setdefault(row.arm, []).append(is_right)
    return {arm: f"{sum(right)} of {len(right)}" for arm, right in counts.items()}


def _place(row: ArmRow) -> Row:
    return {
        "model": row.model, "id": row.prompt.id, "kind": row.prompt.kind,
        "text": row.prompt.text, "prompt_tokens": row.prompt_tokens,
    }  # fmt: skip


def _seconds(row: ArmRow) -> list[float]:
    return [trial.latency_s for trial in row.trials]


def _latency(row: ArmRow) -> Row:
    latency = median_interval(_seconds(row))
    return {
        "latency_s": latency.median, "latency_low_s": latency.low,
        "latency_high_s": latency.high, "repeats": len(row.trials),
    }  # fmt: skip


def _parts(row: ArmRow) -> Row:
    """Medians of where the time went."""
    trials = row.trials
    return {
        "embed_s": float(np.median([t.found.embed_s for t in trials])),
        "lookup_s": float(np.median([t.found.lookup_s for t in trials])),
        "load_s": float(np.median([t.found.load_s for t in trials])),
        "prefill_s": float(np.median([t.prefill_s for t in trials])),
        "decode_s": None if row.arm == NAIVE else float(np.median([t.decode_s for t in trials])),
    }


def _text(row: ArmRow, read: Reader | None) -> str:
    return "" if read is None else read(row.first.token_ids)


def _likeness(row: ArmRow, base: ArmRow) -> float:
    """1 for the same tokens: twice the matching ones over all."""
    return SequenceMatcher(None, row.first.token_ids, base.first.token_ids, autojunk=False).ratio()


def _cosines(
    rows: Sequence[ArmRow], base: dict[str, ArmRow], read: Reader | None, encoder: TextEncoder
) -> list[float | None]:
    """Of each output and the baseline's; exactly 1 for the same text, None without texts."""
    if read is None or not rows:
        return [None] * len(rows)
    ours = [_text(row, read) for row in rows]
    theirs = [_text(base[row.prompt.id], read) for row in rows]
    products = np.einsum("ij,ij->i", encoder.encode(ours), encoder.encode(theirs))
    return [
        1.0 if a == b else float(cosine)
        for a, b, cosine in zip(ours, theirs, products, strict=True)
    ]
