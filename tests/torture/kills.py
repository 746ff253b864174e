"""`kill -9` of a whole `coppice run` with real forward passes, at random moments, until it ends."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_job import write_prompts
from tests.torture.job import Content, check_complete, check_run, job_content, num_answered
from tests.torture.victim import Server, run_command

# The first row of a group to run pays, and after a kill that is another.
MEASURED = ("cached_tokens", "reuse_source")
_LONGEST_S = 300.0


@dataclass
class KillFigures:
    """What the kills of some jobs cost. `largest_waste_parts`: answers that one kill cost, in parts
    of `rows_per_part`."""

    jobs: int = 0
    kills: int = 0
    rows_lost: int = 0
    rows_twice: int = 0
    largest_waste_parts: float = 0.0


@dataclass(frozen=True)
class Job:
    """A command to kill: `rows` prompts of `source` on the model in `model`. `measured`: columns
    that may differ from run to run."""

    base: Path
    source: Path
    model: Path
    rows: int
    rows_per_part: int
    measured: tuple[str, ...] = MEASURED

    def arguments(self, output: Path) -> tuple[str, ...]:
        """Of `coppice`."""
        return (
            "run", str(self.source), "-o", str(output), "--model", str(self.model),
            "--rows-per-part", str(self.rows_per_part), "--max-new-tokens", "8",
            "--dtype", "float32", "--max-rows", "16", "--limit", str(self.rows),
            "--progress", "none",
        )  # fmt: skip


def tiny_job(base: Path, model: Path, rows: int) -> Job:
    """Groups that share a prefix, and some prompts that are equal."""
    prompts: list[str | None] = [
        f"group {i % 7} has a long beginning that is shared: {i % 150}?" for i in range(rows)
    ]
    return Job(base, write_prompts(base / "p.parquet", prompts), model, rows, 20)


def expected_content(job: Job, server: Server) -> tuple[Content, float]:
    """What the job makes undisturbed, and its seconds; the first run fills the caches."""
    for name in ("first", "second"):
        begin = time.monotonic()
        victim = server.start(run_command, job.arguments(job.base / name), job.base / "log")
        victim.join(_LONGEST_S)
        assert victim.exitcode == 0, (job.base / "log").read_text()
    return job_content(job.base / name, *job.measured), time.monotonic() - begin


def kill_until_done(
    job: Job,
    server: Server,
    expected: tuple[Content, float],
    luck: random.Random,
    most_kills: float = math.inf,
) -> KillFigures:
    """One job. Each call of it lives for a random share of what an undisturbed one takes; after
    `most_kills` one is left alone."""
    content, whole_s = expected
    output = job.base / f"out-{luck.getrandbits(32)}"
    figures = KillFigures(jobs=1)
    committed = 0
    while True:
        victim = server.start(run_command, job.arguments(output), job.base / "log")
        victim.join(luck.uniform(0.0, whole_s) if figures.kills < most_kills else _LONGEST_S)
        if victim.exitcode is not None:
            break
        victim.kill()
        victim.join()
        figures.kills += 1
        done = check_run(output)
        figures.rows_twice += len(done) - len(set(done.tolist()))
        waste = committed + server.answered.value - num_answered(output)
        committed = num_answered(output)
        figures.largest_waste_parts = max(figures.largest_waste_parts, waste / job.rows_per_part)
    assert victim.exitcode == 0, (job.base / "log").read_text()
    figures.rows_lost = job.rows - len(check_run(output))
    check_complete(output, content, figures.kills + 1, *job.measured)
    return figures


def add(first: KillFigures, second: KillFigures) -> KillFigures:
    """Of both."""
    return KillFigures(
        first.jobs + second.jobs,
        first.kills + second.kills,
        first.rows_lost + second.rows_lost,
        first.rows_twice + second.rows_twice,
        max(first.largest_waste_parts, second.largest_waste_parts),
    )


def kill_jobs(job: Job, server: Server, kills: int, luck: random.Random) -> KillFigures:
    """Jobs one after the other until there were so many kills."""
    expected = expected_content(job, server)
    total = KillFigures()
    while total.kills < kills:
        total = add(total, kill_until_done(job, server, expected, luck))
    return total
