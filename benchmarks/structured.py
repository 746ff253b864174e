"""Answers that fit schemas: `python -m benchmarks.structured`. Last line: one JSON document.

Random weights, so that these are counts and times and say nothing of quality: what a model of that
size says within a schema is as good as any. Three turns of the same rows by our engine: with
openings as prefill and forced runs packed; every token decoded under its mask; and nothing masked
at all, each row with as many tokens as it had before. What a mask costs is the second beside the
third. Every answer must fit its schema or say that it was cut, or this fails.

`--beside vllm vllm_all_cores`: the same rows under the same schemas by vLLM, each in a process of
its own. `--fit`: only whether all answers fit, of the model of the demo (10,000 rows: minutes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks import structured_arms
from benchmarks.classification_files import FILES, ClassificationFile
from benchmarks.scratch import ROOT
from benchmarks.setup import Setup, add_options, setup_of
from benchmarks.structured_arms import Answers, read_ours
from benchmarks.structured_tasks import SCHEMAS, TASKS, Task
from pipeline.audit.answer_judge import fits
from pipeline.engine import answering
from pipeline.engine.base import Engine, RunControl
from pipeline.engine.load import make_engine
from pipeline.job.planning import PlannedJob
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import plan_job
from pipeline.settings import JobSettings

_HEAD = ("task", "rows", "fit", "cut", "tokens a row", "steps a row", "fewer steps", "ours s",
         "one by one s", "free s", "cost of masks")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.set_defaults(new_tokens=160)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--max-rows", type=int, default=64, help="that decode together")
    also = ", ".join(file.name for file in FILES)
    parser.add_argument(
        "--tasks", nargs="+", default=[task.name for task in TASKS], help=f"also {also}"
    )
    parser.add_argument("--fit", action="store_true", help="of the demo: do all answers fit?")
    parser.add_argument("--beside", nargs="*", default=[], help="engines: vllm vllm_all_cores")
    parser.add_argument("--cache-gib", type=int, default=4, help="KV room of vLLM")
    args = parser.parse_args()
    if args.fit:
        setup: Setup = DemoSetup(**vars(setup_of(args)) | {"shape": "demo", "dtype": "float32"})
        print(check_fit(setup, args.rows, args.max_rows))
        return
    setup = setup_of(args)
    engine = make_engine(settings_of(setup, args.max_rows, "prefix"))
    found, others = {}, {}
    with ExitStack() as files:
        asked = []
        for task in (task for task in (*TASKS, *FILES) if task.name in args.tasks):
            ours, plain = files.enter_context(planned_twice(task, args.rows, setup, args.max_rows))
            found[task.name], answers = measure(ours, plain, engine, setup.repeats)
            asked.append((task.name, plain, answers))
        for name, plain, answers in asked:  # when nothing of ours is measured any more
            others[name] = {
                arm: structured_arms.beside(
                    plain, answers, structured_arms.ask_vllm(arm, setup, plain, args.cache_gib)
                )
                for arm in args.beside
            }
    print(table(found))
    print(structured_arms.table(others))
    report = {"shape": setup.shape, "dtype": setup.dtype, "tasks": found, "beside": others}
    print(json.dumps(report))


class DemoSetup(Setup):
    """With the model that the demo embeds."""

    def model(self) -> str:
        return str(ROOT / "data" / "demo_model")


def settings_of(setup: Setup, max_rows: int, engine: str) -> JobSettings:
    """Of a job by this engine; plans of the naive one have no openings."""
    return JobSettings.from_flat({
        "model": setup.model(), "dtype": setup.dtype, "device": "cpu", "engine": engine,
        "max_rows": max_rows, "max_new_tokens": setup.new_tokens, "json_schema_column": "form",
        "busy_device": "share",
    })  # fmt: skip


def frame_of(task: Task | ClassificationFile, rows: int, setup: Setup) -> pl.DataFrame:
    """The rows, with the schema of each in the column `form`."""
    if isinstance(task, ClassificationFile):
        return task.frame(rows, setup.workloads)
    return task.frame(rows)


@contextmanager
def planned_twice(
    task: Task | ClassificationFile, rows: int, setup: Setup, max_rows: int
) -> Iterator[tuple[PlannedJob, PlannedJob]]:
    """The same rows with and without openings; the file of rows is there as long."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        frame_of(task, rows, setup).write_parquet(path)
        ours = plan_job(str(path), settings_of(setup, max_rows, "prefix"))
        yield ours, plan_job(str(path), settings_of(setup, max_rows, "naive"))


def check_fit(setup: Setup, rows: int, max_rows: int) -> str:
    """A sentence. Raises AssertionError where an answer fits no schema and was not cut."""
    engine = make_engine(settings_of(setup, max_rows, "prefix"))
    with planned_twice(TASKS[-1], rows, setup, max_rows) as (ours, _):
        took, done = answer(engine, ours.plan, ours)
        found = counts(ours, done)
    assert found["fit"] + found["cut"] == found["rows"] == rows
    return (
        f"{rows:,} rows over {len(SCHEMAS)} schemas in {took:.0f} s: {found['fit']:,} parse and "
        f"fit their schema, {found['cut']:,} say length, 0 do neither"
    )


def measure(
    ours: PlannedJob, plain: PlannedJob, engine: Engine, repeats: int
) -> tuple[dict[str, float], Answers]:
    """Counts of one turn, medians of the seconds of all; and the answers. Raises AssertionError
    where an answer fits no schema and was not cut."""
    seconds: dict[str, list[float]] = {"ours": [], "one by one": [], "free": []}
    for _ in range(repeats):
        took, done = answer(engine, ours.plan, ours)
        seconds["ours"].append(took)
        with decoding_each():
            took, said = answer(engine, plain.plan, plain)
        seconds["one by one"].append(took)
        forwards = engine.counters.num_forwards
        took, _ = answer(engine, as_many_free(plain.plan, said), plain)
        seconds["free"].append(took)
        assert engine.counters.num_forwards == forwards, "the free job takes other steps"
    found = counts(ours, done) | timings(seconds)
    return found, read_ours(ours, done, found["ours_s"])


def answer(engine: Engine, plan: Plan, planned: PlannedJob) -> tuple[float, list[Completion]]:
    """Seconds and what was said; caches are cold."""
    control = RunControl(grammars=planned.job.tokenizer.grammars)
    begin = time.perf_counter()
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), control))
    return time.perf_counter() - begin, done


@contextmanager
def decoding_each() -> Iterator[None]:
    """Forced tokens are decoded as all others."""
    before = answering.LEAST_RUN
    answering.LEAST_RUN = 1 << 30  # type: ignore[misc]
    try:
        yield
    finally:
        answering.LEAST_RUN = before  # type: ignore[misc]


def as_many_free(plan: Plan, said: list[Completion]) -> Plan:
    """The same rows without constraints, each with as many tokens as it said."""
    lengths = np.zeros(len(plan.sequences), np.int64)
    for completion in said:
        lengths[completion.sequence] = max(1, len(completion.token_ids))
    distinct, chosen = np.unique(lengths, return_inverse=True)
    params = tuple(
        replace(plan.params[0], constraint="", ignore_eos=True, max_new_tokens=int(length))
        for length in distinct
    )
    return replace(plan, params=params, sequences=replace(plan.sequences, params=chosen))


def counts(planned: PlannedJob, done: list[Completion]) -> dict[str, float]:
    """Of whole answers, their openings among them."""
    tokens = steps = fit = cut = 0
    for completion in done:
        assert completion.finish_reason != "error", completion
        params = planned.plan.params_of(completion.sequence)
        said = (*params.opening, *completion.token_ids)
        tokens += len(said)
        steps += len(completion.token_ids) - completion.forced_tokens
        if completion.finish_reason == "length":
            cut += 1
            continue
        text = planned.job.tokenizer.decode_batch([said])[0]
        assert fits(text, params.constraint), text
        fit += 1
    rows = len(done)
    return {"rows": rows, "fit": fit, "cut": cut, "tokens_a_row": tokens / rows,
            "steps_a_row": steps / rows, "fewer_steps": 1 - steps / tokens}  # fmt: skip


def timings(seconds: dict[str, list[float]]) -> dict[str, float]:
    medians = {f"{name}_s": statistics.median(some) for name, some in seconds.items()}
    pairs = zip(seconds["one by one"], seconds["free"], strict=True)
    return medians | {"mask_cost": statistics.median(a / b - 1 for a, b in pairs)}


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    lines = [_HEAD, ("---", *("---:",) * (len(_HEAD) - 1))]
    for name, one in found.items():
        lines.append((
            name, f"{one['rows']:,}", f"{one['fit']:,}", f"{one['cut']:,}",
            f"{one['tokens_a_row']:.1f}", f"{one['steps_a_row']:.1f}",
            f"{one['fewer_steps']:.0%}", f"{one['ours_s']:.1f}", f"{one['one by one_s']:.1f}",
            f"{one['free_s']:.1f}", f"{one['mask_cost']:+.1%}",
        ))  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
