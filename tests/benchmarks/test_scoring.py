"""The benchmark of scores: what is asked shares what the real tasks share, and what is counted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
pytestmark = pytest.mark.filterwarnings("default")  # the harness and its packages warn of much

from benchmarks import scoring_arms, scratch  # noqa: E402
from benchmarks.limit import Dimensions  # noqa: E402
from benchmarks.scoring import add_vllm, compare, limit_s, table  # noqa: E402
from benchmarks.scoring_arms import Ours, Scores, Theirs, count_points  # noqa: E402
from benchmarks.scoring_memory import most_resident, wide_rows  # noqa: E402
from benchmarks.scoring_tasks import Task, Words, make_task  # noqa: E402
from benchmarks.setup import Setup  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from kvcoppice.evaluation.evaluator import Request, plan_requests  # noqa: E402

# (given every token, one forward a context) over distinct ones, counted on the real data
REAL = {
    "mmlu 5-shot": (29.4, 7.4),
    "bbh 3-shot": (33.6, 30.7),
    "mmlu_continuation 5-shot": (24.7, 23.9),
    "hellaswag 10-shot": (3.9, 3.9),
    "mmlu 0-shot": (5.2, 1.3),
    "hellaswag 0-shot": (2.4, 2.4),
}


@pytest.fixture(scope="module")
def workloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the shared folder: a tokenizer of one token a word, and three files of sentences."""
    folder, draw = tmp_path_factory.mktemp("workloads"), random.Random(0)
    words = ["A", "B", "C", "D", "E", "(", ")", *(f"w{i}" for i in range(2000))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("squad_passages", "gsm8k_8shot", "mt_bench"):
        prompts = [" ".join(draw.choices(words[7:], k=12)) + "." for _ in range(1500)]
        pl.DataFrame({"prompt": prompts}).write_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, workloads: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(scratch.VARIABLE, str(tmp_path_factory.mktemp("bench")))
        yield Setup("tiny", "float32", 1, 1, 60.0, workloads, workloads)


@pytest.mark.parametrize("name", REAL)
def test_a_task_shares_what_the_real_one_shares(workloads: Path, name: str) -> None:
    task = make_task(name, Words(workloads))
    plan = plan_requests(task.requests, 32768)
    contexts = {r.context.tobytes() + r.continuation[:-1].tobytes(): r for r in task.requests}
    forwards = sum(len(r.context) + len(r.continuation) - 1 for r in contexts.values())
    counted = task.sent_tokens / plan.tree.unique_tokens, forwards / plan.tree.unique_tokens
    assert counted == pytest.approx(REAL[name], rel=0.2)
    assert plan.scores is not None and plan.scores.num_points == count_points(task.requests)


def test_both_arms_give_the_same_scores_and_count_what_they_feed(setup: Setup) -> None:
    requests = make_task("mmlu_continuation 5-shot", Words(setup.workloads), 0.008).requests
    arms: Any = {"coppice": Ours(setup), "hf": Theirs(setup, [1, 2])}
    found = compare("a task", arms, requests, setup)
    assert found["coppice"]["of_u"] == 1.0 and found["hf"]["of_u"] > 4
    assert found["hf"]["nats"] <= 1e-4 and arms["hf"].batch_of(requests) in (1, 2)
    assert limit_s(requests, Dimensions.of(SHAPES["tiny"]), 1e9, found) > 0
    written = table({"a task": found | {"limit_s": 0.5}})
    assert "| a task | 8 |" in written and len(written.splitlines()) == 3


def test_scores_that_part_in_float32_end_the_benchmark(setup: Setup) -> None:
    class Fixed:
        def __init__(self, score: float) -> None:
            self._score = score

        def score(self, requests: Any) -> Scores:
            return Scores(1.0, 1, 1, [(self._score, True)])

    with pytest.raises(AssertionError):
        compare("a task", {"coppice": Fixed(-1.0), "hf": Fixed(-1.001)}, [], setup)


def test_what_vllm_answers_stands_beside_ours_on_the_same_documents(setup: Setup) -> None:
    ids = np.arange(9, dtype=np.uint32)
    few = Task("a task", [[Request(ids[:5], ids[5:6]), Request(ids[:5], ids[6:8])]])
    ours = Ours(setup)
    own = ours.score(few.requests)
    line = {"task": "a task", "engine": "vllm", "seconds": 2.0, "computed": 13,
            "scores": [[total - 0.5, False] for total, _ in own.scores]}  # fmt: skip
    found: dict[str, Any] = {"a task": {}}
    add_vllm(found, [few], ours, {"a task": line})
    assert found["a task"]["vllm"]["nats"] == pytest.approx(0.5)
    assert found["a task"]["vllm"]["of_u"] == 13 / own.computed
    add_vllm(found, [few], ours, {"failure": {"said": "no room"}})
    assert found["a task"]["vllm"] == {"failure": "no room"}


def test_vllm_is_asked_in_its_own_environment_and_what_it_finished_counts(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo \'{"task": "mmlu 0-shot", "seconds": 1.0, "computed": 3, "scores": []}\' > "$3"\n'
        "exit 3\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr("benchmarks.launcher.python_of", lambda name: python)
    monkeypatch.setattr("benchmarks.arms.python_of", lambda name: python)
    task = make_task("mmlu 0-shot", Words(setup.workloads), 0.01)
    found = scoring_arms.ask_vllm(setup, [task], 1)
    assert found["mmlu 0-shot"]["computed"] == 3 and "exit 3" in found["failure"]["said"]


def test_rows_with_more_choices_have_more_requests_and_memory_is_of_this_process() -> None:
    assert len(wide_rows(4, 100)) * 3 == len(wide_rows(12, 100))
    status = psutil.Process().memory_info()
    assert most_resident() >= status.rss - (16 << 20)
