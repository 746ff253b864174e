"""Who answers under schemas in `benchmarks.structured` beside our engine: vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.launcher import ask_script
from benchmarks.setup import Setup
from pipeline.audit.answer_judge import fits
from pipeline.constraints import schema_of
from pipeline.job.planning import PlannedJob
from pipeline.records import Completion

Found = dict[str, Any]


class Answers(NamedTuple):
    """Of each row of the table its text and whether it was cut, and the seconds of all of them."""

    texts: list[str]
    are_cut: list[bool]
    seconds: float


def read_ours(planned: PlannedJob, done: Sequence[Completion], seconds: float) -> Answers:
    """The texts of whole answers, their openings among them."""
    ids: list[tuple[int, ...]] = [()] * len(done)
    cut = [False] * len(done)
    for completion in done:
        row = planned.plan.row_of(completion.sequence, completion.turn)
        opening = planned.plan.params_of(completion.sequence).opening
        ids[row] = (*opening, *completion.token_ids)
        cut[row] = completion.finish_reason == "length"
    return Answers(planned.job.tokenizer.decode_batch(ids), cut, seconds)


def ask_vllm(arm: str, setup: Setup, planned: PlannedJob, cache_gib: int) -> Found:
    """What vLLM gives, in a process of its own; `failure`: why it gave nothing. `planned` is a plan
    without openings."""
    plan = planned.plan
    rows = range(len(plan.sequences))
    schemas = [schema_of(constraint_of(planned, row)) for row in rows]
    job = {
        "model": setup.model(), "dtype": setup.dtype, "cache_gib": cache_gib, "schemas": schemas,
        "prompts": [plan.table[row].tolist() for row in rows], "new_tokens": setup.new_tokens,
        "warm_up": list(range(11, 43)),
    }  # fmt: skip
    said, failure = ask_script("vllm_structured", job, arm, setup.time_limit_s)
    if failure is not None or not said:
        return {"failure": failure or "ended without an answer"}
    found: Found = json.loads(said)
    return found


def constraint_of(planned: PlannedJob, row: int) -> str:
    """What the answer of a row of the table must be."""
    plan = planned.plan
    return plan.params_of(int(plan.sequence_of_row[row])).constraint


def beside(planned: PlannedJob, ours: Answers, theirs: Mapping[str, Any]) -> Found:
    """What a peer gave, counted as ours is. Both say JSON of the same schemas, but a peer's answer
    ends with a token of its own, and near ties fall otherwise: so what they mean is compared.
    Raises AssertionError where an answer that was not cut fits no schema."""
    if "failure" in theirs:
        return dict(theirs)
    ids = [tuple(said) for said, _ in theirs["answers"]]
    texts = planned.job.tokenizer.decode_batch(ids)
    cut = [reason == "length" for _, reason in theirs["answers"]]
    fit = same = both = 0
    for row, text in enumerate(texts):
        if cut[row]:
            continue
        assert fits(text, constraint_of(planned, row)), text
        fit += 1
        if not ours.are_cut[row]:
            both += 1
            same += json.loads(text) == json.loads(ours.texts[row])
    return {
        "engine": theirs["engine"], "seconds": theirs["seconds"], "computed": theirs["computed"],
        "tokens_a_row": sum(map(len, ids)) / len(ids), "fit": fit, "cut": sum(cut),
        "both_whole": both, "same": same, "ratio": theirs["seconds"] / ours.seconds,
    }  # fmt: skip


def table(found: Mapping[str, Mapping[str, Found]]) -> str:
    """As Markdown, by task and arm; nothing where nobody was asked."""
    rows = [(task, arm, of) for task, arms in found.items() for arm, of in arms.items()]
    if not rows:
        return ""
    lines = [
        "| task | engine | seconds | tokens a row | fit | cut | same of both whole | : coppice |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, arm, of in rows:
        if "failure" in of:
            lines.append(f"| {task} | {arm}: {of['failure']} | | | | | | |")
            continue
        lines.append(
            f"| {task} | {of['engine']}, {arm} | {of['seconds']:.1f} | {of['tokens_a_row']:.1f} | "
            f"{of['fit']:,} | {of['cut']:,} | {of['same']:,} of {of['both_whole']:,} | "
            f"{of['ratio']:.2f} |"
        )
    return "\n".join([*lines, ""])
