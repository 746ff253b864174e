"""The page of the study: tables of what was measured, beside what was expected and published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.segments.orders import BARS, ORDERS, Score, judge_bar, judge_order
from pipeline.segments.published import TABLES
from pipeline.segments.tasks import TASKS

VOID_BELOW = 0.3
Scores = dict[tuple[str, str], Score]


def render(content: dict[str, Any]) -> str:
    """Markdown of what `run_study` found."""
    scores = _gather(content["measured"])
    arms = list(dict.fromkeys(one["arm"] for one in content["measured"]))
    rows = sum(one["rows"] for one in content["measured"] if one["arm"] == "full") // len(TASKS)
    void: dict[str, str] = {task: " (void)" for task in TASKS if _lost(scores, task) < VOID_BELOW}
    found = [
        (task + void.get(task, ""), *said)
        for order in ORDERS
        for task, *said in judge_order(order, scores)
    ]
    parts = [
        "# Documents at any position: the study",
        f"{rows:,} rows a task, {content['settings']['seeds']} seeds, each with rows and adapters "
        f"of its own; {content['seconds']:,} s. Answers are one value: exact match of the greedy "
        "token, ± standard error.",
        "## Dependence",
        _table(
            ("task", "full", "documents apart", "apart, below the preamble", "dependence", ""),
            [_dependence(scores, task) for task in TASKS],
        ),
        "## Exact match",
        _table(
            ("arm", *TASKS),
            [(arm, *(str(scores[arm, task]) for task in TASKS)) for arm in arms],
        ),
        "## Distance from full attention",
        "KL(full, arm) in nats and share of rows with the same token; all tasks.",
        _table(
            ("arm", "KL", "same token"),
            [(arm, *(_mean(content, arm, name) for name in ("kl", "top1"))) for arm in arms],
        ),
        "## Cost of a row",
        "Own tokens count the question; the documents' encoding, once for all rows, stands apart.",
        _costs(content, arms),
        "## Share of a prefill that a row computes itself",
        _shares(content["layers"]),
        "## Expected orders",
        _table(("task", "expected", "found"), found),
        "## Bars",
        _table(("bar", "found"), [judge_bar(bar, scores) for bar in BARS]),
        "## Training",
        _training(content["training"]),
        "## As published, of other models and data",
    ]  # fmt: skip
    for table in TABLES:
        parts += [_table(table.head, table.rows), table.note]
    return "\n\n".join(parts) + "\n"


def _gather(measured: Sequence[dict[str, Any]]) -> Scores:
    """Exact match by arm and task, over all seeds."""
    found: Scores = {}
    for arm, task in dict.fromkeys((one["arm"], one["task"]) for one in measured):
        some = [one for one in measured if (one["arm"], one["task"]) == (arm, task)]
        rows = sum(one["rows"] for one in some)
        by_seed = np.array([one["exact"] for one in some])
        mean = float(by_seed.mean())
        spread = float(by_seed.std(ddof=1)) / math.sqrt(len(some)) if len(some) > 1 else 0.0
        own = float(np.mean([one["own"] / one["prompt"] for one in some]))
        found[arm, task] = Score(mean, max(math.sqrt(mean * (1 - mean) / rows), spread), own)
    return found


def _dependence(scores: Scores, task: str) -> tuple[str, ...]:
    whole, apart, below = (scores[arm, task] for arm in ("full", "concat", "concat below"))
    lost = _lost(scores, task)
    error = math.hypot(whole.error, apart.error)
    verdict = "void" if lost < VOID_BELOW else ""
    return task, str(whole), str(apart), str(below), f"{lost:+.3f} ± {error:.3f}", verdict


def _lost(scores: Scores, task: str) -> float:
    """How much worse answers are where documents do not see each other."""
    return scores["full", task].mean - scores["concat", task].mean


def _mean(content: dict[str, Any], arm: str, name: str) -> str:
    return f"{np.mean([one[name] for one in content['measured'] if one['arm'] == arm]):.3f}"


def _costs(content: dict[str, Any], arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        some = [one for one in content["measured"] if one["arm"] == arm]
        own, prompt, flops, encoding = (
            float(np.mean([one[name] for one in some]))
            for name in ("own", "prompt", "mflops", "encoding_mflops")
        )
        copies = prompt * content["kv_bytes_per_token"] if some[0]["copies"] else 0
        encoded = "" if arm.endswith("full") else f"{encoding:.1f}"
        rows.append(
            (arm, f"{own:.1f}", f"{own / prompt:.0%}", f"{flops:.1f}", encoded, f"{copies:,.0f}")
        )
    head = (
        "arm",
        "own tokens",
        "of the prompt",
        "MFLOP",
        "MFLOP to encode",
        "bytes of its own copy",
    )
    return _table(head, rows)


def _shares(layers: int) -> str:
    """By formula, for documents of 300 tokens, ten a row."""
    documents, length = 10, 300
    total = documents * length

    def blend(share: float, depth: int) -> float:
        return 2 / depth + share * (1 - 2 / depth)

    rows = [
        (f"CacheBlend {r:.0%}", *(f"{blend(r, n):.1%}" for n in (layers, 32))) for r in (0.1, 0.3)
    ]
    rows += [(f"EPIC {k}", *[f"{(documents - 1) * k / total:.1%}"] * 2) for k in (8, 32)]
    rows += [(f"KVLink{k}", *[f"{documents * k / total:.1%}"] * 2) for k in (1, 5)]
    rows += [("packet 8", "0, and once 1 + 16/n a token", "the same")]
    return _table(("ten documents of 300 tokens", f"{layers} layers", "32 layers"), rows)


def _training(facts: Sequence[dict[str, Any]]) -> str:
    rows = []
    for arm in dict.fromkeys(fact["arm"] for fact in facts):
        some = [fact for fact in facts if fact["arm"] == arm]
        before, after = (
            f"{np.mean([fact[when]['kl'] for fact in some]):.3f}" for when in ("before", "after")
        )
        drift = [fact["drift"] for fact in some if "drift" in fact]
        epochs = [str(fact["epochs"]) for fact in some if "epochs" in fact]
        rows.append(
            (arm, before, after, ", ".join(epochs), f"{np.mean(drift):.1%}" if drift else "")
        )
    head = ("arm", "held-out KL before", "after", "best epoch by seed", "drift at full attention")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows))
