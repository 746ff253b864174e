"""The summary of a plan as a table for people. Knows nothing about how the numbers were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cli.progress import format_bytes, format_duration
from pipeline.cli.tables import Rows, rejections
from pipeline.costs import Cost

_SHOWN_GROUPS = 3


def plan_table(summary: Mapping[str, Any]) -> Rows:
    """`plan/summary.json` as a table."""
    peak = summary["peak_kv_bytes"]
    budget = format_bytes(summary["kv_budget_bytes"] or 0)
    order = summary["saving_in_given_order"]
    cache = f"{order['cache_tokens']:,}"
    blocks = ", ".join(f"{x:.1%} at {size}" for size, x in summary["saving_by_blocks"].items())
    rejected = f", {summary['rows_rejected']:,} cannot run" if summary["rows_rejected"] else ""
    aside = "; later turns aside" if summary.get("conversations") else ""
    what = "requests" if summary.get("scores") else "rows"
    most = "at most " if summary.get("conversations") else ""  # answers are part of later prompts
    rows = [
        ("rows", f"{summary['rows']:,}{rejected}"),
        *(rejections(summary["rejections"]) if summary["rejections"] else ()),
        ("distinct prompts", f"{summary['distinct_prompts']:,}"),
        ("sequences to run", f"{summary['sequences']:,}"),
        ("prompt tokens T", f"{most}{summary['prompt_tokens']:,}"),
        ("unique tokens U", f"{most}{summary['unique_tokens']:,}"),
        ("prefill saved", f"{summary['saving']:.1%}  (1 - U/T)"),
        ("  by blocks", f"{blocks} tokens  (a prefix cache without limit)"),
        ("  in given order", f"{order['saving']:.1%}  (an LRU cache of {cache} tokens{aside})"),
        ("new tokens D", f"at most {summary['max_new_tokens']:,}"),
        ("upper bound on gain", f"{summary['gain_bound']:.2f}x  ((T + D) / (U + D))"),
        ("prefix groups", f"{summary['groups']:,}, and {summary['singletons']:,} {what} in none"),
        ("peak KV", "unknown (no model)" if peak is None else format_bytes(peak)),
    ]
    if summary["rows_at_once"] is not None:
        running = "conversations" if summary.get("conversations") else what
        rows.append((f"{running} at once", f"{summary['rows_at_once']:,} within {budget}"))
    if summary["estimate"]:
        prefill, decode = (summary["estimate"][name] for name in ("prefill_s", "decode_s"))
        split = f"prefill {format_duration(prefill)}, decode {format_duration(decode)} at most"
        measured = f"at the rates of {summary['estimate']['measured_on']}"
        total = format_duration(prefill + decode)
        rows.append(("estimated time", f"{total}  ({split}, {measured})"))
    if summary.get("cost"):
        cost = Cost(**summary["cost"])
        rows.append(("cost", "at most " * (cost.total is not None) + cost.sentence()))
    if summary["store"]:
        least = summary["store"]["break_even_tokens"]
        when = "loading never pays here" if least is None else f"loading pays from {least:,} on"
        rows.append(("in the KV store", f"{summary['store']['tokens']:,} of U  ({when})"))
    if summary.get("documents"):
        rows += _document_rows(summary["documents"])
    if summary.get("conversations"):
        rows += conversation_rows(summary["conversations"])
    if summary.get("scores"):
        rows += _score_rows(summary["scores"], summary["unique_tokens"])
    if summary["fields"]:
        rows.append(("fields", summary["fields"]["text"]))
    if summary.get("warning"):
        rows.append(("warning", summary["warning"]))
    if summary["advice"]:
        rows.append(("advice", summary["advice"]["text"]))
    for group in summary["largest_groups"][:_SHOWN_GROUPS]:
        examples = ", ".join(group["example_ids"])
        shared = f"share {group['prefix_tokens']:,} tokens, such as {examples}"
        rows.append((f"group {group['group_id']}", f"{group['rows']:,} {what} {shared}"))
    if summary["depth_histogram"]:
        rows.append((f"{what} by reuse depth", histogram(summary["depth_histogram"])))
    return rows


def _document_rows(documents: Mapping[str, Any]) -> Rows:
    """What `summary["documents"]` says."""
    size = documents["kv_bytes"]
    held = "" if size is None else f", {format_bytes(size)} of KV"
    asked = (
        ("in given order", documents["in_given_order"]),
        ("in best order", documents["in_best_order"]),
        ("at any position", documents["at_any_position"]),
        (f"by {documents['mode']}", documents["by_this_mode"]),
    )
    total = documents["prompt_tokens"]
    return [
        ("documents", f"{documents['distinct']:,} distinct, {documents['uses']:,} uses"),
        ("  each once", f"{documents['tokens']:,} tokens{held}"),
        *(
            (f"  {how}", f"{tokens:,} tokens to compute, {1 - tokens / max(1, total):.1%} saved")
            for how, tokens in asked
            if tokens is not None
        ),
        *((("  advice", documents["text"]),) if documents["text"] else ()),
    ]


def conversation_rows(found: Mapping[str, Any]) -> Rows:
    """What `summary["conversations"]` says."""
    size = found["state_bytes"]
    held = "" if size is None else f", {format_bytes(size)} of KV"
    resent, carried = found["resent_tokens"], found["carried_tokens"]
    window, budget = f"{found['window_tokens']:,}", f"{found['budget_tokens']:,}"
    turns = f"{found['turns']:,} turns, up to {found['most_turns']:,} in one"
    evicting, giving_way = found["evictor"] != "none", found.get("giving_way")
    kept = f"{found['turns_beyond_budget']:,} turns, by {found['evictor']}"
    return [
        ("conversations", f"{found['conversations']:,} with {turns}"),
        (
            "  new tokens",
            f"{found['new_tokens']:,}, and at most {found['answer_tokens']:,} answers",
        ),
        ("  longest", f"at most {found['longest_tokens']:,} tokens"),
        (f"  beyond {window}", f"at most {found['turns_beyond_window']:,} turns (the context)"),
        *([(f"  beyond {budget}", f"at most {kept} (the budget)")] if evicting else ()),
        ("  KV carried", f"at most {carried:,} tokens to compute"),
        ("  sent again", f"at most {resent:,}, {resent / max(1, carried):.1f}x as many"),
        ("  state", f"at most {found['state_tokens']:,} tokens{held}"),
        *([("  giving way", giving_way)] if giving_way else []),
        *((("  advice", found["text"]),) if found["text"] else ()),
    ]


def _score_rows(scores: Mapping[str, Any], unique: int) -> Rows:
    """What `summary["scores"]` says."""

    def times(tokens: int) -> str:
        return f"{tokens:,} tokens to compute, {tokens / max(1, unique):.1f}x U"

    cut = scores["rows_cut"]
    return [
        *(
            [("questions", f"{scores['questions']:,} {scores['text'].removeprefix('questions ')}")]
            if "text" in scores
            else []
        ),
        ("requests", f"{scores['requests']:,}, {scores['scored_tokens']:,} tokens scored"),
        (
            "  contexts",
            f"{scores['contexts']:,}, {scores['continuations']:,} continuations behind them",
        ),
        ("  head computed", f"at {scores['scored_positions']:,} positions"),
        ("  one by one", times(scores["resent_tokens"])),
        ("  each prompt once", times(scores["resent_once_tokens"])),
        *([("  cut", f"{cut:,} rows lose the beginning of their context")] if cut else []),
    ]


def histogram(bins: Sequence[Mapping[str, int]]) -> str:
    """One line per bin: range of tokens, rows, and a bar."""
    most = max(b["rows"] for b in bins)
    ranges = [
        str(b["from"]) if b["to"] - b["from"] == 1 else f"{b['from']}-{b['to'] - 1}" for b in bins
    ]
    width = max(map(len, ranges))
    return "\n".join(
        f"{name:>{width}}  {b['rows']:>9,}  {'█' * round(24 * b['rows'] / most)}".rstrip()
        for name, b in zip(ranges, bins, strict=True)
        if b["rows"]
    )
