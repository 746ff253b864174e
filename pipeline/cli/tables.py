"""Tables and lines for people, 80 columns wide. Knows nothing about how the numbers were made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.audit.gate import WHY_NOT
from pipeline.cli.progress import format_bytes, format_duration
from pipeline.cli.streams import writing
from pipeline.costs import Cost
from pipeline.job.agreement import describe_calibration
from pipeline.visible import visible, visible_json

Rows = Sequence[tuple[str, str]]
_SHOWN_IDS = 64


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout and nothing else. Raises OutputLost, as all that print here."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    writing(lambda out: out.write(visible_json(text) + "\n"))


def print_found(
    title: str, found: Mapping[str, Any], as_json: bool, table: Callable[[Mapping[str, Any]], Rows]
) -> None:
    """What was found, as JSON or as a table on stdout."""
    if as_json:
        print_json(found)
    else:
        print_table(title, table(found))


def print_table(title: str, rows: Rows) -> None:
    """Two columns on stdout: what, and how much."""
    table = _make_table(title, rows)
    writing(lambda out: Console(file=out).print(table, highlight=False))


def print_columns(title: str, names: Mapping[str, bool], rows: Sequence[Sequence[str]]) -> None:
    """A table with a line of names on stdout. `names`: of the columns, and which are numbers."""
    table = Table(title=Text(visible(title)), title_justify="left", box=None, pad_edge=False)
    for name, is_number in names.items():
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    writing(lambda out: Console(file=out).print(table, highlight=False))


def watch_status(title: str, read: Callable[[], Mapping[str, Any]], every_s: float = 2.0) -> None:
    """Show what `read` says in one place of the screen until the job has ended, or Ctrl-C.

    A job that is not there yet is waited for. Where stdout is no terminal, only the last state is
    printed.
    """
    with suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        while True:
            state = read()
            live.update(_make_table(title, status_table(state)), refresh=True)
            if state["status"] not in ("waiting", "planning", "running"):
                return
            time.sleep(every_s)


def _make_table(title: str, rows: Rows) -> Table:
    """Texts, so that no name and no path is taken for markup."""
    table = Table(
        title=Text(visible(title)),
        title_justify="left",
        show_header=False,
        box=None,
        pad_edge=False,
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(visible(name)), Text(visible(value, lines=True)))
    return table


def counter_table(
    counters: Mapping[str, float], reasons: Mapping[str, int], cost: Cost | None = None
) -> Rows:
    """The counters of `run.json` as a table, why rows failed, and what it cost."""
    whole = {name: f"{int(value):,}" for name, value in counters.items()}
    rows = [
        ("rows", f"{whole['rows_ok']} ok, {whole['rows_error']} failed"),
        *((f"  {reason}", f"{count:,}") for reason, count in reasons.items()),
        ("prompt tokens", whole["prompt_tokens"]),
        ("prefilled tokens", f"{whole['prefilled_tokens']} (unique: {whole['unique_tokens']})"),
        ("cached tokens", whole["cached_tokens"]),
        ("generated tokens", whole["generated_tokens"]),
        ("time", format_duration(counters["wall_s"]) + phases(counters)),
    ]
    if counters["span_s"] > 0:
        rows.append(("device busy", f"{counters['busy_s'] / counters['span_s']:.0%}"))
    if "rows_degenerate" in counters:
        rows.append(("turns that repeat", f"{whole['rows_degenerate']} of {whole['rows_ok']}"))
    if counters["peak_kv_bytes"]:
        rows.append(("peak KV", format_bytes(int(counters["peak_kv_bytes"]))))
    if cost is not None:
        rows.append(("cost", cost.sentence()))
    return rows


def phases(counters: Mapping[str, float]) -> str:
    """` (prefill 3s, decode 10s)`, or nothing where the engine does not tell them apart."""
    if not counters["prefill_s"] and not counters["decode_s"]:
        return ""
    prefill, decode = (format_duration(counters[name]) for name in ("prefill_s", "decode_s"))
    return f" (prefill {prefill}, decode {decode})"


def _free_running_rows(free: Mapping[str, int]) -> Rows:
    """Nothing where no row was written anew: only greedy answers are."""
    said = f"{free['exact']:,} of {free['rows']:,} identical"
    return [("free-running", said)] if free["rows"] else []


def audit_table(summary: Mapping[str, Any]) -> Rows:
    """`audit/summary.json` as a table."""
    classes = ", ".join(f"{n:,} {name}" for name, n in summary["classes"].items() if n)
    rows = [
        ("verdict", f"{summary['verdict'].upper()} (tier {summary['tier']})"),
        ("rows audited", f"{summary['rows_audited']:,}: {classes or 'none'}"),
        ("differing share", f"at most {summary['bound_95']:.2%} of all rows (95 %)"),
        ("prefix groups", f"{summary['groups_covered']:,} of {summary['groups_total']:,} covered"),
        *_free_running_rows(summary["free_running"]),
        ("tokens checked", f"{summary['tokens_checked']:,}"),
        *_evidence_rows(summary),
    ]
    if scores := summary.get("scores"):
        said = f"{scores['same_choice']:,} of {scores['rows_with_a_choice']:,}"
        worst, mean = _nats(scores["delta_max"]), _nats(scores["delta_mean"])
        rows += [("same choice", said), ("off by", f"at most {worst}, on average {mean}")]
        for name, one in scores.get("questions", {}).items():
            said = f"{one['same_answer']:,} of {one['rows']:,} the same"
            rows.append((f"  {name}", f"{said}, off by at most {_nats(one['delta_max'])}"))
    return rows + [("because", reason) for reason in summary["reasons"]]


def _evidence_rows(summary: Mapping[str, Any]) -> Rows:
    """The audit's other arms, where there were any."""
    arms, faults, strict = (summary.get(name) for name in ("arms", "faults", "strict"))
    rows: list[tuple[str, str]] = []
    if arms:
        shared, alone = arms["product"], arms["batched"]
        said = (
            f"{shared['rows_exact']} of {shared['rows']} with reuse, {alone['rows_exact']} without"
        )
        rows.append(("exact in a batch", said))
    weights = summary.get("weights")
    if weights:
        same = f"{weights['same_choice']:.2%} of tokens as by the weights as saved"
        rows.append(("int8 weights", f"{same}; KL {_nats(weights['kl_mean'])}"))
    attention = summary.get("attention")
    if attention:
        same = f"{attention['rows_exact']} of {attention['rows']} rows the same by it"
        rows.append(("full attention", f"{same}; KL {_nats(attention['kl_mean'])}"))
    if strict and strict["rows"]:
        rows.append(("same bits alone", f"{strict['rows_same_bits']} of {strict['rows']}"))
    if faults and faults["planted"]:
        changed = f"{faults['changed_an_answer']} that changed an answer"
        planted = f"({faults['planted']} planted)"
        rows.append(("planted faults", f"{faults['caught']} of {changed} caught  {planted}"))
    return rows


def _nats(mean: float | None) -> str:
    return "not a number" if mean is None else f"{mean:.1e} nats"


def status_table(state: Mapping[str, Any]) -> Rows:
    """What `read_status` found as a table."""
    if state["status"] == "waiting":
        return [("status", "waiting: there is no run yet")]
    rows = [
        ("status", state["status"]),
        ("rows", f"{state['rows_done']:,} of {state['rows']:,} ({state['rows_failed']:,} failed)"),
        ("rows left", f"{state['rows_left']:,}"),
    ]
    if "rows_read" in state:
        rows.append(("rows read", f"{state['rows_read']:,}"))
    if state["rows_per_s"] is not None:
        rows += [
            ("rows per second", f"{state['rows_per_s']:.2f}"),
            ("prefill tokens/s", f"{state['prefill_tokens_per_s']:,.0f}"),
            ("decode tokens/s", f"{state['decode_tokens_per_s']:,.0f}"),
            ("last heard from", state["at"]),
        ]
    if state["eta_s"] is not None:
        rows.append(("ETA", format_duration(state["eta_s"])))
    if state.get("calibration"):
        rows.append(("documents", describe_calibration(state["calibration"])))
    if state["audit"] is not None:
        rows.append(("audit", WHY_NOT.get(state["audit"], state["audit"])))
    return [*rows, *(("note", note) for note in state.get("notes", ()))]


def rejections(found: Mapping[str, Any]) -> Rows:
    """Why rows cannot run: reasons with counts, and examples."""
    return [
        *((f"  {reason}", f"{count:,}") for reason, count in found["reasons"].items()),
        *((f"  e.g. {e['id']}", f"{e['error_type']}: {e['message']}") for e in found["examples"]),
    ]


def validation_table(found: Mapping[str, Any]) -> Rows:
    """What `validate_input` found as a table."""
    rows = [("rows", f"{found['rows']:,}"), ("cannot run", f"{found['rows_rejected']:,}")]
    rows += rejections(found)
    rows += [("note", note) for note in found["notes"]]
    if changed := found.get("rows_changed_by_joining"):
        said = "rows would be other tokens in one piece; let segments end where words do"
        rows.append(("tokens at borders", f"{changed:,} {said}"))
    if found["warning"] is not None:
        rows.append(("warning", found["warning"]))
    for piece in found.get("first_conversation") or ():
        shown = f"{len(piece['token_ids']):,} token ids  {_shown_ids(piece['token_ids'])}"
        rows += [(f"turn {piece['turn']}, adds", piece["added"]), (f"  {piece['id']}", shown)]
    if found["first"] is not None:
        ids = found["first"]["token_ids"]
        rows += [
            ("first prompt", found["first"]["id"]),
            ("rendered", found["first"]["rendered"]),
            (f"{len(ids):,} token ids", _shown_ids(ids)),
        ]
        for piece in found["first"].get("continuations", ()):
            about = f"{piece['question']}: " if "question" in piece else ""
            rows.append((f"  {about}{piece['text']!r}", _shown_ids(piece["token_ids"])))
    return rows


def _shown_ids(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids[:_SHOWN_IDS])) + (" ..." if len(ids) > _SHOWN_IDS else "")
