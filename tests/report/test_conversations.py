"""How conversations fared: numbers from rows, alarms first, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from pipeline.report.conversations import ConversationHealth, measure_conversations
from pipeline.report.page import render
from pipeline.storage.part_file import write_part
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.schema import CONVERSATION_FIELDS, OUTPUT_FIELDS
from tests.report.run_sample import COUNTERS, PLAN
from tests.report.test_page import read_page

HEALTHY: dict[str, Any] = {
    "history_tokens": 0, "kept_tokens": 20, "evicted_tokens": 0, "evictions": 0, "span": 20,
    "ctx_frac": 0.2, "skew": 0, "duplicate_positions": 0, "runs": 1, "gap_ratio": 0.0,
    "sink_kept": True, "mass_kept": 1.0, "key_turns": 0, "prefill_peak": 12, "degenerate": False,
}  # fmt: skip
WORSE: dict[tuple[str, int], dict[str, Any]] = {
    ("a", 2): {"ctx_frac": 0.91, "span": 91, "history_tokens": 60},
    ("a", 3): {"evictions": 2, "evicted_tokens": 40, "ctx_frac": 0.9, "runs": 3, "mass_kept": 0.6},
    ("a", 4): {"evicted_tokens": 40, "degenerate": True, "gap_ratio": 0.25, "key_turns": 2},
    ("b", 1): {"evictions": 1, "evicted_tokens": 40, "mass_kept": 0.75, "prefill_peak": 70},
    ("b", 2): {"degenerate": True, "evicted_tokens": 40},
    ("c", 2): {"status": "error", "error_type": "ContextExceeded"},
    ("c", 3): {"status": "error", "error_type": "PriorTurnFailed"},
}


def rows_of(worse: dict[tuple[str, int], dict[str, Any]] = WORSE) -> pl.DataFrame:
    """Conversations a, b and c of four, two and three turns; user's numbers have gaps."""
    rows: list[dict[str, object]] = []
    for name, turns in (("a", 4), ("b", 2), ("c", 3)):
        for turn in range(1, turns + 1):
            base = HEALTHY | {
                "id": f"{name}{turn}", "row_index": len(rows), "status": "ok",
                "conversation_id": name, "turn": 10 * turn, "prompt_tokens": 10 * turn,
                "cached_tokens": 10 * turn - 10, "finish_reason": "stop", "latency_s": 1.0,
                "queue_s": 0.0, "reuse_depth": 0,
            }  # fmt: skip
            found = base | worse.get((name, turn), {})
            if found["status"] == "error":
                found |= dict.fromkeys(HEALTHY) | {"prompt_tokens": None, "cached_tokens": 0}
            rows.append(found)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    missing = [f.name for f in (*OUTPUT_FIELDS, *CONVERSATION_FIELDS) if f.name not in frame]
    return frame.with_columns(pl.lit(None).alias(name) for name in missing)


def measured(
    worse: dict[tuple[str, int], dict[str, Any]] = WORSE, bar: float | None = None
) -> ConversationHealth:
    settings = {"conversations": {"max_degenerate": bar}}
    health = measure_conversations(rows_of(worse).lazy(), settings)
    assert health is not None
    return health


def test_the_worst_of_all_turns_is_told_and_not_their_mean() -> None:
    health = measured()
    assert (health.conversations, health.turns, health.longest) == (3, 7, 4)
    assert (health.span, health.ctx_frac, health.runs) == (91, 0.91, 3)
    assert (health.gap_ratio, health.mass_kept, health.key_turns) == (0.25, 0.6, 2)
    assert (health.history_tokens, health.prefill_peak) == (60, 70)
    assert (health.evicting, health.evictions, health.near_window) == (2, 3, 1)


def test_tokens_given_up_are_counted_once_a_conversation() -> None:
    """A row says how many are gone so far. Two conversations have lost the same number."""
    assert measured().evicted_tokens == 80


def test_computed_tokens_stand_against_those_of_sending_histories_again() -> None:
    health = measured()
    assert health.prompt_tokens == 10 + 20 + 30 + 40 + 10 + 20 + 10
    assert health.computed_tokens == 70 and health.resent_ratio == 2.0


def test_turns_are_binned_by_window_and_by_their_place() -> None:
    """The place in the conversation, whatever numbers the input gave."""
    health = measured()
    assert health.by_window == (
        ("0–25 %", 5), ("25–50 %", 0), ("50–75 %", 0), ("75–90 %", 1), ("90–100 %", 1)
    )  # fmt: skip
    shown = [(b.label, b.turns, b.degenerate) for b in health.by_turn]
    assert shown == [("1", 3, 0), ("2", 2, 1), ("3", 1, 0), ("4", 1, 1)]


@pytest.mark.parametrize(("bar", "is_over"), [(None, False), (0.5, False), (0.02, True)])
def test_alarms_come_worst_first(bar: float | None, is_over: bool) -> None:
    alarms = measured(bar=bar).alarms
    assert [alarm.split(" of 9 turns")[0] for alarm in alarms] == ["2", "1", "1", "1", "2"]
    assert "repeat" in alarms[0] and ("--max-degenerate" in alarms[0]) == is_over
    skewed = measured({("a", 3): {"skew": 5}, ("b", 2): {"duplicate_positions": 1}}).alarms
    assert skewed == [
        "2 of 9 turns have keys that stand in a query's future or twice: a fault of coppice, do "
        "not use these answers"
    ]
    assert measured({}).alarms == []


def test_rows_that_are_no_turns_have_no_such_section() -> None:
    plain = rows_of().drop(f.name for f in CONVERSATION_FIELDS)
    assert measure_conversations(plain.lazy(), {}) is None


def make_run(root: Path, rows: pl.DataFrame, bar: float | None = 0.02) -> RunDirectory:
    fields = [*OUTPUT_FIELDS, *CONVERSATION_FIELDS]
    columns = [
        pa.nulls(len(rows), f.type)
        if rows[f.name].dtype == pl.Null
        else rows[f.name].to_arrow().cast(f.type)
        for f in fields
    ]
    settings = {"model": {"model": "demo"}, "conversations": {"max_degenerate": bar}}
    with RunDirectory.create_or_resume(root, {"input": "abc"}, {"settings": settings}) as run:
        table = pa.Table.from_arrays(columns, schema=pa.schema(fields))
        write_part(root / "data", 0, table, {"run_id": run.run_id})
        run.write_json("plan/summary.json", PLAN)
        run.update_manifest(status="complete", counters=COUNTERS, sessions=[{"wall_s": 9.0}])
    return RunDirectory.open(root)


def test_the_page_begins_with_the_alarm_and_shows_the_rest(tmp_path: Path) -> None:
    render(make_run(tmp_path / "run", rows_of()))
    html = (tmp_path / "run" / "report.html").read_text()
    text = " ".join(" ".join(read_page(html).texts).split())
    assert html.index("repeat themselves") < html.index('class="claim"')
    for shown in ("7 turns of 3 conversations", "91.0 %", "3, 80", "60.0 %", "computes 2 times"):
        assert shown in text, shown
    assert html.count('<svg viewBox="') >= 4 and "window-" in html and "degenerate-" in html
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert "- 2 of 9 turns repeat themselves" in markdown
    assert "| turns that repeat themselves | 2 (28.6 %) |" in markdown


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    render(make_run(tmp_path / "run", rows_of().filter(pl.col("status") == "error")))
    assert "0</b> turns of" in (tmp_path / "run" / "report.html").read_text()


def test_a_page_of_nights_tells_how_conversations_fared_in_each(tmp_path: Path) -> None:
    for day, degenerate in ((10, 12), (11, 60)):
        run = make_run(tmp_path / f"2026-11-{day}", rows_of())
        health = {"rows_degenerate": degenerate, "rows_evicting": 300, "rows_skewed": 0}
        manifest = json.loads((run.root / "run.json").read_text())
        manifest["counters"] |= health
        (run.root / "run.json").write_text(json.dumps(manifest))
    render(RunDirectory.open(tmp_path / "2026-11-11"))
    page = (tmp_path / "2026-11-11" / "report.html").read_text()
    nights = page[page.index('id="night-table"') :]
    for shown in ("repeat themselves", "gave up tokens", "skewed", "1.0 %", "5.0 %", "25.0 %"):
        assert shown in nights, shown
    markdown = (tmp_path / "2026-11-11" / "report.md").read_text()
    assert "turns that repeat themselves 5.0 % (was 1.0 %)" in markdown
