"""`coppice recycle build` and `experiment`: flags in, a call of the library. Holds no logic."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import Json, LogFormat, Progress
from pipeline.cli.layers import merge
from pipeline.cli.logs import make_observer
from pipeline.cli.progress import format_bytes
from pipeline.cli.streams import write_result
from pipeline.errors import UsageError

app = typer.Typer()


@app.command()
def build(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="CSV (id, text) or Parquet file.")
    ],
    model: Annotated[str, typer.Option("--model", help="Folder or hub id.")],
    kv_store: Annotated[Path, typer.Option("--kv-store", help="Folder of the store.")],
    kv_store_budget: Annotated[
        str | None, typer.Option("--kv-store-budget", help="Such as 8GiB.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = None,
    json: Json = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Compute the KV of these prompts and keep it for jobs."""
    from pipeline.cli.tables import print_json
    from pipeline.experiment.kept_states import build_store

    flags = {
        "model": model, "kv_store": str(kv_store), "kv_store_budget": kv_store_budget,
        "dtype": dtype,
    }  # fmt: skip
    built = build_store(prompts, merge(flags, None), make_observer(progress, log_format).say)
    if json:
        print_json(asdict(built))
        return
    write_result(
        f"{built.stored:,} of {built.prompts:,} prompts stored ({built.refused:,} were there "
        f"already or had no room): {built.tokens:,} tokens, {format_bytes(built.bytes)}, "
        f"{built.seconds:.1f} s"
    )


@app.command()
def experiment(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    model: Annotated[
        str | None, typer.Option("--model", help="To time (else DialoGPT-medium or its shape).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Of random weights (else the demo's).")
    ] = None,
    cache_prompts: Annotated[
        Path | None, typer.Option("--cache-prompts", help="Kept: CSV of id, text, kind.")
    ] = None,
    test_prompts: Annotated[
        Path | None, typer.Option("--test-prompts", help="Asked: the same, and answer.")
    ] = None,
    workloads: Annotated[
        Path | None, typer.Option("--workloads", help="Folder of more prompts for the index.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds.")] = 30,
    depth_repeats: Annotated[
        int, typer.Option("--depth-repeats", min=1, help="Of the reuse depths.")
    ] = 30,
    warmups: Annotated[int, typer.Option("--warmups", min=0, help="Discarded runs.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of runs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny shape; quote nothing.")] = False,
    progress: Progress = "auto",
    log_format: LogFormat = "text",
) -> None:
    """Measure the paper's arms; exit code 1 if reuse changed a token."""
    from pipeline.cli.demo import demo_folder
    from pipeline.experiment.paper import PaperSettings, run_paper
    from pipeline.experiment.protocol import Protocol

    if workloads is not None and not workloads.is_dir():
        raise UsageError(f"there is no folder {workloads}; check --workloads")
    settings = PaperSettings(
        demo=demo_folder(),
        output=output,
        model=model,
        tokenizer=tokenizer,
        cache_prompts=cache_prompts,
        test_prompts=test_prompts,
        workloads=workloads,
        protocol=Protocol(min(repeats, 3) if quick else repeats, warmups, seed),
        depth_repeats=min(depth_repeats, 3) if quick else depth_repeats,
        is_quick=quick,
    )
    run_paper(settings, make_observer(progress, log_format).say)
    write_result((output / "summary.md").read_text("utf-8").rstrip("\n"))
