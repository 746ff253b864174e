"""The demos: plan, run, audit and report on the models and prompts that come along, offline."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.cli.logs import make_observer
from pipeline.cli.streams import result_is_kept, write_result
from pipeline.cli.tables import audit_table, counter_table, print_table
from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.run import run_job, write_report
from pipeline.settings import JobSettings

_PACKAGE = Path(__file__).resolve().parents[1]


def demo_folder() -> Path:
    """Where model and prompts lie: inside the installed package, or `data/` of a checkout.

    Raises UsageError if they are in neither.
    """
    for folder in (_PACKAGE / "demo", _PACKAGE.parent / "data"):
        if (folder / "prompts.parquet").is_file():
            return folder
    raise UsageError("the demo's model and prompts are not installed; install coppice again")


def run_demo(output: Path, progress: str, log_format: str) -> None:
    """Do the main job in fp32 and print where everything is. Raises AuditFailed and its kin."""
    folder = demo_folder()
    flat = {"model": str(folder / "demo_model"), "dtype": "float32", "audit_sample": "10%"}
    settings = JobSettings.from_flat(flat)
    outcome = run_job(
        str(folder / "prompts.parquet"), output, settings, make_observer(progress, log_format)
    )
    run = Location(output)
    verdict = audit_run(run, settings.audit, make_observer(progress, log_format))
    page = write_report(run)["page"]
    summary = describe_audit(run)
    paths = [
        ("answers", f"{output}/data/*.parquet"),
        ("plan", f"{output}/plan/plan.parquet"),
        ("audit", f"{output}/audit/audit.parquet"),
        ("report", page),
    ]
    with result_is_kept(output):
        print_table("Run", counter_table(outcome.counters, outcome.reasons))
        write_result("")
        print_table("Audit against plain full prefill", audit_table(summary))
        write_result("")
        print_table("Where to look", paths)
    verdict.check(output)


def run_segments_demo(output: Path, progress: str, log_format: str) -> None:
    """The same questions by prefixes and with documents at any position, side by side.

    Raises AuditFailed and its kin.
    """
    folder = demo_folder()
    rows = pl.read_parquet(folder / "segment_prompts.parquet").select("id", "answer")
    found = {}
    for mode in ("prefix", "concat"):
        run, observer = output / mode, make_observer(progress, log_format)
        flat = {"model": str(folder / "segment_model"), "dtype": "float32", "reuse": mode}
        settings = JobSettings.from_flat(flat | {"audit_sample": "10%"})
        outcome = run_job(str(folder / "segment_prompts.parquet"), run, settings, observer)
        verdict = audit_run(Location(run), settings.audit, make_observer(progress, log_format))
        verdict.check(run)
        answers = pl.read_parquet(run / "data" / "*.parquet").select("id", "generated_text")
        found[mode] = outcome.counters, rows.join(answers, on="id")
    (plain, by_prefix), (moved, by_document) = found.values()
    both = by_prefix.join(by_document, on="id", suffix="_moved").select(
        same=pl.col("generated_text") == pl.col("generated_text_moved"),
        right=_is_right("generated_text"),
        right_moved=_is_right("generated_text_moved"),
    )
    share = both.mean().row(0, named=True)
    with result_is_kept(output):
        print_table(
            f"{len(rows)} questions over documents: by prefixes / at any position",
            [
                ("prompt tokens", f"{plain['prompt_tokens']:,}"),
                ("computed", f"{plain['prefilled_tokens']:,} / {moved['prefilled_tokens']:,}"),
                ("seconds", f"{plain['wall_s']:.1f} / {moved['wall_s']:.1f}"),
                ("right answers", f"{share['right']:.1%} / {share['right_moved']:.1%}"),
                ("same answers", f"{share['same']:.1%}"),
                ("audits", "both passed: each way is computed as it says"),
                ("answers", f"{output}/prefix/data, {output}/concat/data"),
            ],
        )


def run_conversations_demo(output: Path, progress: str, log_format: str) -> None:
    """Conversations of three windows by two evictors. Raises AuditFailed and its kin."""
    folder = demo_folder()
    prompts = str(folder / "conversation_prompts.parquet")
    rows = pl.read_parquet(prompts).select("id", "answer", "kind")
    counters, right = {}, {}
    for evictor, first in (("sink-recent", {}), ("gist-recent", {"gist_tokens": 40})):
        run, observer = output / evictor, make_observer(progress, log_format)
        flat = {"model": str(folder / "stateful_model"), "dtype": "float32", "max_new_tokens": 2}
        flat |= {"conversation_column": "conversation_id", "turn_column": "turn", "evict": evictor}
        settings = JobSettings.from_flat(flat | first | {"budget_tokens": 192})
        counters[evictor] = run_job(prompts, run, settings, observer).counters
        verdict = audit_run(Location(run), settings.audit, make_observer(progress, log_format))
        verdict.check(run)
        answers = pl.read_parquet(run / "data" / "*.parquet").select("id", "generated_text")
        found = rows.join(answers, on="id").select("kind", right=_starts_right("generated_text"))
        right[evictor] = dict(found.group_by("kind").mean().iter_rows())
    one = counters["sink-recent"]
    shares = {
        kind: " / ".join(f"{right[evictor][kind]:.1%}" for evictor in right)
        for kind in ("gist", "mid", "recent")
    }
    with result_is_kept(output):
        print_table(
            f"{len(rows)} turns, 192 tokens kept: the last ones / the first and the last",
            [
                ("prompt tokens", f"{one['prompt_tokens']:,}, each turn with its history"),
                ("computed", f"{one['prefilled_tokens']:,}"),
                ("seconds", " / ".join(f"{each['wall_s']:.1f}" for each in counters.values())),
                ("right, first turn", shares["gist"]),
                ("right, between", shares["mid"]),
                ("right, last two", shares["recent"]),
                ("audits", "both passed: each evictor is computed as it says"),
                ("answers", f"{output}/sink-recent/data, {output}/gist-recent/data"),
            ],
        )


def _starts_right(column: str) -> pl.Expr:
    return (
        pl.col(column).str.strip_chars().str.split(" ").list.first()
        == pl.col("answer").str.strip_chars()
    )


def _is_right(column: str) -> pl.Expr:
    return pl.col(column).str.strip_chars() == pl.col("answer").str.strip_chars()
