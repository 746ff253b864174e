"""A small finished run on disk, made through the real `RunDirectory`; its numbers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.storage.part_file import write_part
from pipeline.storage.run_directory import RunDirectory
from pipeline.storage.schema import OUTPUT_FIELDS

EVIL_ID = "</script><img src=x onerror=\"document.title='owned'\">"
EVIL = "</td><script>alert('x')</script> | [a](https://evil.example) & more"
COUNTERS = {
    "rows_in": 1203,
    "rows_ok": 1200,
    "rows_error": 3,
    "prompt_tokens": 412_345,
    "unique_tokens": 98_765,
    "prefilled_tokens": 98_765,
    "cached_tokens": 313_580,
    "generated_tokens": 45_678,
    "peak_kv_bytes": 123 << 20,
    "wall_s": 92.4,
    "prefill_s": 30.0,
    "decode_s": 55.0,
    "busy_s": 87.3,
    "span_s": 90.0,
}
PLAN = {
    "rows": 1203, "rows_rejected": 3, "prompt_tokens": 412_345, "unique_tokens": 98_765,
    "saving": 0.7604797, "max_new_tokens": 57_000, "peak_kv_bytes": 119 << 20,
    "kv_budget_bytes": 512 << 20, "plan_hash": "c0ffee" * 8,
}  # fmt: skip
AUDIT: dict[str, Any] = {
    "verdict": "pass", "reasons": [], "tier": "exact", "rows_audited": 299, "rows_exact": 298,
    "exact_rate": 298 / 299, "bound_95": 0.01577, "tokens_checked": 9123, "groups_total": 24,
    "classes": {"identical": 298, "near_tie": 1, "drift": 0, "corrupt": 0}, "groups_covered": 24,
    "free_running": {"rows": 30, "exact": 30, "unexplained": 0}, "near_tie_bar": 1e-3,
    "similarity": {"encoder": "mini", "mean": 0.9998, "min": 0.944}, "hard_bar": 0.5,
    "seconds": 12.0, "seed": 7,
    "arms": {
        name: {"rows": 16, "rows_exact": exact, "kl_max": kl, "gap_p999": gap}
        for name, exact, kl, gap in (
            ("again", 16, 0.0, 0.0), ("batched", 15, 2.5e-9, 2e-5),
            ("reuse", 16, 1e-9, 1e-5), ("product", 14, 3e-9, 3e-5),
        )
    },
    "faults": {"planted": 8, "changed_an_answer": 5, "caught": 5, "each": []},
    "strict": {"rows": 16, "rows_same_bits": 16},
}  # fmt: skip


def output_rows() -> pl.DataFrame:
    """1203 rows: 24 groups of growing size and depth, some rows alone, three failed."""
    rng = np.random.default_rng(5)
    group = np.sort(rng.integers(0, 25, 1200) ** 2 // 25)
    depth = np.where(group == 0, 0, 12 * 2 ** (group % 8))
    first = np.diff(group, prepend=-1) > 0
    own = rng.integers(20, 90, 1200)
    queue = rng.uniform(0, 40, 1200)
    service = 0.4 + own / 200 + first * depth / 800 + rng.gamma(2, 0.15, 1200)
    ok = pl.DataFrame(
        {
            "id": [f"row-{i}" for i in range(1200)],
            "row_index": range(1200),
            "generated_text": [f" {i % 7} " for i in range(1200)],
            "finish_reason": "stop",
            "prompt_tokens": depth + own,
            "completion_tokens": 38,
            "cached_tokens": np.where(first, 0, depth),
            "reuse_depth": depth,
            "group_id": pl.Series(group).replace(0, None),
            "queue_s": queue,
            "latency_s": queue + service,
            "status": "ok",
            "answer": [None if i % 3 else str(i % 5) for i in range(1200)],
            "task": ["arithmetic" if i % 2 else "lookup" for i in range(1200)],
        }
    )
    failed = pl.DataFrame(
        {
            "id": ["row-1200", EVIL_ID, "<b>1202</b>"],
            "row_index": [1200, 1201, 1202],
            "status": "error",
            "error_type": ["NullPrompt", "PromptTooLong", "EngineError"],
            "error_message": [
                "the prompt is null",
                "the prompt has 9,120 tokens, the model takes 2,048; shorten it or use "
                "--on-overlong truncate-left",
                EVIL,
            ],
            "answer": ["1", None, None],
            "task": ["lookup", "lookup", "lookup"],
        }
    )
    return pl.concat([ok, failed], how="diagonal_relaxed")


def audited_rows() -> pl.DataFrame:
    """Every fourth row, one of them a near-tie at its third token and one with a wrong end."""
    rows = output_rows().gather_every(4).head(299)
    differs = {7: ("near_tie", 2, 4e-4), 9: ("corrupt", 5, None)}
    return pl.DataFrame(
        {
            "id": [EVIL_ID if i == 7 else f"row-{4 * i}" for i in range(299)],
            "row_index": rows["row_index"],
            "group_id": rows["group_id"],
            "reuse_depth": rows["reuse_depth"],
            "audit_exact": [i not in differs for i in range(299)],
            "audit_class": [differs.get(i, ("identical",))[0] for i in range(299)],
            "audit_first_divergence": [differs.get(i, (0, None))[1] for i in range(299)],
            "audit_margin": [differs.get(i, (0, 0, None))[2] for i in range(299)],
        }
    )


def tree_nodes() -> pl.DataFrame:
    """A root that all 1200 answered rows share, 24 groups of 40 rows below it, 240 rows alone."""
    sizes = [40] * 24 + [1] * 240
    num = len(sizes)
    return pl.DataFrame(
        {
            "node": range(num + 1),
            "parent": [None] + [0] * num,
            "start": [0] + [12] * num,
            "end": [12] + [12 + 12 * 2 ** (i % 6) for i in range(num)],
            "prompt_lo": [0, *np.cumsum([0, *sizes[:-1]])],
            "prompt_hi": [sum(sizes), *np.cumsum(sizes)],
            "rows": [sum(sizes), *sizes],
            "is_group": [size > 1 for size in [1, *sizes]],
        }
    )


def to_table(rows: pl.DataFrame) -> pa.Table:
    """With all output columns, typed as the writer has them; carried columns come last."""
    carried = [name for name in ("answer", "task") if name in rows.columns]
    schema = pa.schema([*OUTPUT_FIELDS, *(pa.field(name, pa.string()) for name in carried)])
    columns = [
        rows[field.name].to_arrow().cast(field.type)
        if field.name in rows.columns
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def make_run(root: Path, rows: pl.DataFrame, audit: dict[str, Any] | None = AUDIT) -> RunDirectory:
    """A run directory that holds `rows` in one part; an empty frame is a run that just began."""
    settings = {
        "model": {"model": "demo", "dtype": "float32", "revision": None},
        "tokens": {"system_prompt": "be brief and secret"},
        "engine": {"max_rows": 256, "kv_budget": None},
    }
    description = {"settings": settings, "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    device = {"asked_for": "cpu", "cpus": 2}
    with RunDirectory.create_or_resume(
        root, {"input": "abc"}, description | {"device": device, "input": {"rows": len(rows)}}
    ) as directory:
        if len(rows):
            write_part(root / "data", 0, to_table(rows), {"run_id": directory.run_id})
            directory.write_json("plan/summary.json", PLAN)
            directory.write_frame("plan/tree.parquet", tree_nodes())
            directory.update_manifest(
                status="complete",
                counters=COUNTERS,
                sessions=[{"wall_s": 92.4}],
                engine={"name": "prefix", "notes": ["two threads"]},
            )
        if audit is not None:
            directory.write_json("audit/summary.json", audit)
            directory.write_frame("audit/audit.parquet", audited_rows())
    return RunDirectory.open(root)


def make_nights(job: Path, nights: int = 8) -> list[Path]:
    """Folders named by date of one job, oldest first: one damaged, one that goes on, one failed."""
    roots = [job / f"2026-11-{day:02d}" for day in range(10, 10 + nights)]
    for place, root in enumerate(roots):
        failed = AUDIT | {"verdict": "fail", "reasons": ["1 of 299 rows are corrupt"]}
        directory = make_run(root, output_rows(), failed if place == 3 else AUDIT)
        manifest = json.loads((root / "run.json").read_text())
        manifest["counters"] |= {
            "rows_in": 1203 + 3 * place, "rows_ok": 1200 + 3 * place,
            "rows_error": [3, 0, 0, 12, 1, 0, 5, 3][place % 8],
            "prefilled_tokens": 98_765 + 100 * place,
            "wall_s": 92.4 - 3 * place, "cached_tokens": 313_580 - 9_000 * (place % 3),
        }  # fmt: skip
        directory.write_json("run.json", manifest)
        directory.write_text("report.html", "")
    (roots[1] / "run.json").write_text("{", encoding="utf-8")
    (roots[4] / "audit" / "summary.json").unlink()
    begun = json.loads((roots[4] / "run.json").read_text())
    (roots[4] / "run.json").write_text(json.dumps(begun | {"status": "running", "counters": {}}))
    return roots
