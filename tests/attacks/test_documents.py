"""Rows in segments that nobody would write."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError, UsageError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.plan.document_order import best_order
from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.job.test_documents import MovingEngine, Row, write_rows
from tests.tiny_job import answers, on


@pytest.fixture
def flat(model_folder: Path) -> dict[str, Any]:
    defaults = {"max_new_tokens": 4, "device": "cpu", "on_overlong": "keep", "calibration_rows": 0}
    return defaults | {"model": str(model_folder)}


@pytest.mark.fault(
    "prompts in segments",
    injected="rows of 5,000 documents, a document twice in a row, documents alone, no document",
    outcome="planned, answered and counted as any; each distinct document is encoded once",
)
@pytest.mark.parametrize("order", ["given", "best"])
def test_many_documents_and_the_same_one_twice(tmp_path: Path, flat: Any, order: str) -> None:
    words = [f"{number} ".rjust(5, "a") for number in range(2500)]
    rows: list[Row] = [
        ("p ", words * 2, "q"), ("p ", words[::-1] * 2, "r"),
        ("", ["once", "once"], "s"), ("", [], "t"),
    ]  # fmt: skip
    source = write_rows(tmp_path / "in.parquet", rows)
    settings = JobSettings.from_flat(flat | {"reuse": "concat", "document_order": order})
    run_job(str(source), tmp_path / "out", settings, make_engine=on(MovingEngine()))
    found = answers(tmp_path / "out")
    assert found["status"].to_list() == ["ok"] * 4
    assert found["documents"].to_list() == [5000, 5000, 2, 0]
    assert found["exact"].to_list() == [False, False, False, True]
    figures = json.loads((tmp_path / "out" / "plan" / "summary.json").read_bytes())["documents"]
    assert (figures["distinct"], figures["uses"]) == (2501, 10_002)


@pytest.mark.fault(
    "prompts in segments",
    injected="a file of which no row can run, with --reuse concat, calibrated",
    outcome="every row an error with its reason; the run is complete",
)
def test_a_file_of_which_no_row_can_run(tmp_path: Path, flat: Any) -> None:
    """Seen red: IndexError where rows to calibrate were chosen."""
    source = write_rows(tmp_path / "in.parquet", [("p ", [], ""), ("p ", [""], "q")])
    more = {"reuse": "concat", "calibration_rows": 9, "fail_on_error": "100%"}
    settings = JobSettings.from_flat(flat | more)
    run_job(str(source), tmp_path / "out", settings, make_engine=on(MovingEngine()))
    assert answers(tmp_path / "out")["error_type"].to_list() == ["BadSegments"] * 2


@pytest.mark.fault(
    "prompts in segments",
    injected="rows with documents that cannot run, or whose answer fails",
    outcome="their columns say nothing of a way of computing, and not that an answer is exact",
)
def test_a_row_without_an_answer_is_not_exact(tmp_path: Path, flat: Any) -> None:
    """Seen red: rows that had failed were exact, and had no documents."""

    class Failing(MovingEngine):
        def _completions(self, *given: Any, **named: Any) -> Any:
            for done in super()._completions(*given, **named):
                is_last = done.sequence == len(given[0].sequences) - 1
                failed: dict[str, Any] = {
                    "finish_reason": "error",
                    "error_type": "EngineError",
                    "token_ids": (),
                }
                yield replace(done, **failed) if is_last else done

    rows: list[Row] = [("p ", ["a", ""], "q"), ("p ", ["a"], "q"), ("p ", ["b"], "r")]
    source = write_rows(tmp_path / "in.parquet", rows)
    settings = JobSettings.from_flat(flat | {"reuse": "concat", "fail_on_error": "100%"})
    run_job(str(source), tmp_path / "out", settings, make_engine=on(Failing()))
    found = answers(tmp_path / "out").sort("row_index")
    assert sorted(found["status"]) == ["error", "error", "ok"]
    columns = found.select("status", "reuse_mode", "exact", "documents", "document_tokens").rows()
    assert columns[0] == ("error", None, None, None, None)
    assert sorted(columns[1:]) == [("error", "concat", None, 1, 1), ("ok", "concat", True, 1, 1)]


@pytest.mark.fault(
    "prompts in segments",
    injected="the same text for two tenants, before and in documents",
    outcome="no token is shared: each tenant's documents are a tree of their own",
)
def test_tenants_share_no_document(tmp_path: Path, flat: Any) -> None:
    rows: list[Row] = [("p ", ["one ", "two "], "q"), ("p ", ["two ", "one "], "r")]
    for context in ("preamble", "alone"):
        alone = []
        for tenants in (["a", "a"], ["a", "b"]):
            source = write_rows(tmp_path / f"{tenants[1]}.parquet", rows, tenant=tenants)
            more = {"reuse": "concat", "document_context": context}
            planned = plan_job(str(source), JobSettings.from_flat(flat | more))
            alone.append(planned.summary.unique_tokens)
        assert planned.plan.reuse_depth.tolist() == [0, 0] and planned.summary.groups == 0
        assert alone == [2 + 8 + 2, 2 * (2 + 8 + 1)]


def test_the_order_of_documents_is_found_in_time_that_grows_as_they_do() -> None:
    """Seen red: a row that all agree in began anew for each document, 30 s."""
    rows = [list(range(5000)) if row % 2 else list(range(5000))[::-1] for row in range(20)]
    started = time.process_time()
    best_order(rows, [7] * 5000, [0] * 20)
    assert time.process_time() - started < 5


@pytest.mark.fault(
    "prompts in segments",
    injected="--document-order best without the memory that it takes; convert to a batch file",
    outcome="refused, exit code 2, saying how much memory is needed, or which column is missing",
)
def test_what_cannot_be_done_with_segments_is_refused(tmp_path: Path, flat: Any) -> None:
    source = write_rows(tmp_path / "in.parquet")
    settings = JobSettings.from_flat(flat | {"document_order": "best", "plan_memory": 1000})
    with pytest.raises(UsageError, match="give it --plan-memory 1GiB"):
        plan_job(str(source), settings)
    less = JobSettings.from_flat(flat | {"plan_memory": 1000})
    figures = plan_job(str(source), less).summary.documents
    assert figures is not None and figures["in_best_order"] is None and figures["text"]
    with pytest.raises(InputError, match="a batch file cannot say"):
        convert(Location(source), Location(tmp_path / "out.jsonl"), False)
