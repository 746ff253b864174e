"""The page of a plan: its numbers are those of the summary, and it fetches and runs nothing."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.plan_files import write_plan_page
from pipeline.run import plan_job
from pipeline.settings import JobSettings
from tests.job.test_documents import write_rows
from tests.tiny_job import write_prompts


def test_the_page_says_what_the_summary_says(tmp_path: Path, settings: JobSettings) -> None:
    prompts = [f"at {i} o clock\nsay what this long instruction asks for\nq {i}" for i in range(30)]
    source = write_prompts(tmp_path / "p.parquet", [*prompts, "<b>alone</b>"])
    planned = plan_job(str(source), settings)
    write_plan_page(planned, "p & q.parquet", tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    summary = planned.summary
    for number in (summary.prompt_tokens, summary.unique_tokens, summary.distinct_prompts):
        assert f"{number:,}" in page
    assert f"{100 * summary.saving:.1f}" in page
    assert summary.advice is not None and summary.advice["text"][1:] in page
    assert "p &amp; q.parquet" in page and "<b>alone" not in page
    assert page.count("<script") == 1 and not re.search(r"https?://", page)
    boxes = re.search(r'<svg[^>]*aria-label="Prefixes.*?</svg>', page, re.DOTALL)
    assert boxes is not None and boxes[0].count("<rect") > 30


def test_the_page_compares_ways_to_reuse_documents(tmp_path: Path, model_folder: Path) -> None:
    source = write_rows(tmp_path / "in.parquet")
    for reuse in ("prefix", "concat"):
        settings = JobSettings.from_flat({"model": str(model_folder), "reuse": reuse})
        planned = plan_job(str(source), settings)
        write_plan_page(planned, "p", tmp_path / "plan.html")
        page, figures = (tmp_path / "plan.html").read_text(), planned.summary.documents
        assert figures is not None
        for name in ("in_given_order", "in_best_order", "at_any_position", "by_this_mode"):
            assert f'<td class="number">{figures[name]:,}</td>' in page
        assert figures["text"][1:].replace("'", "&#39;") in page
        assert ("What is shared" in page) == (reuse == "prefix")


def test_a_plan_without_a_row_that_can_run_has_a_page(
    tmp_path: Path, settings: JobSettings
) -> None:
    source = write_prompts(tmp_path / "p.parquet", [None, ""])
    write_plan_page(plan_job(str(source), settings), "p", tmp_path / "plan.html")
    assert "0.0 %" in (tmp_path / "plan.html").read_text()
