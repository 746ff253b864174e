"""Whole evaluations by lm-evaluation-harness: tasks, what outlives a process, the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcoppice.evaluation.kept_results import KeptResults
from pipeline.errors import StorageError
from pipeline.records import Scored
from tests.harness_models import (
    MODEL,
    PAIRS,
    SMALL_MODEL,
    CachingLM,
    CoppiceLM,
    TaskManager,
    load,
    load_theirs,
    requests_of,
    simple_evaluate,
)
from tests.lm_eval_tasks.make import FOLDER

pytestmark = pytest.mark.filterwarnings("default")  # the harness and its packages warn of much
CHOICE_TASKS = ("mmlu", "mmlu_continuation", "bbh_choice", "hellaswag_10", "hellaswag_0")


@pytest.fixture(scope="module")
def ours() -> CoppiceLM:
    return load()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return load_theirs()


def task(name: str, cache: Path) -> dict[str, Any]:
    """One of `lm_eval_tasks`, from any working directory and with no cache but its own."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    said = config["dataset_kwargs"]
    files = {split: str(FOLDER / file) for split, file in said["data_files"].items()}
    return config | {"dataset_kwargs": {"data_files": files, "cache_dir": str(cache)}}


def evaluate(model: Any, names: tuple[str, ...], cache: Path, **options: Any) -> dict[str, Any]:
    tasks = [task(name, cache) for name in names]
    options |= {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    found: dict[str, Any] = simple_evaluate(model, tasks=tasks, **options)
    return found


def test_five_tasks_give_every_document_the_same_scores(tmp_path: Path) -> None:
    # The other model is so sure of its tasks that of these texts `hf` itself is 1e-4 from float64.
    ours, theirs = load(SMALL_MODEL), load_theirs(SMALL_MODEL)
    found, expected = (evaluate(lm, CHOICE_TASKS, tmp_path) for lm in (ours, theirs))
    assert ours.evaluator.counts.asked == 12 * (4 + 4 + 2 + 4 + 4)
    assert ours.evaluator.counts.computed_tokens == ours.evaluator.counts.unique_tokens
    for name in CHOICE_TASKS:
        here, there = (r["samples"][f"small_{name}"] for r in (found, expected))
        assert len(here) == len(there) == 12
        for one, other in zip(here, there, strict=True):
            assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
            assert one["doc_hash"] == other["doc_hash"]
            scores = [[logprob for ((logprob, _),) in r["resps"]] for r in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert found["results"] == expected["results"]


@pytest.mark.parametrize("chat", [False, True])
def test_generated_answers_and_perplexities_are_the_same(
    ours: CoppiceLM, theirs: Any, tmp_path: Path, chat: bool
) -> None:
    names = ("bbh",) if chat else ("bbh", "wikitext")
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    found, expected = (evaluate(lm, names, tmp_path, **options) for lm in (ours, theirs))
    for here, there in zip(*(r["samples"]["small_bbh"] for r in (found, expected)), strict=True):
        assert here["resps"] == there["resps"]
    for name, metrics in expected["results"].items():
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        here = {key: found["results"][name][key] for key in numbers}
        assert here == pytest.approx(numbers, rel=1e-6) and numbers


class Died(Exception):
    """Stands for whatever ends a process."""


def dying_after(scores: Callable[..., Iterator[tuple[int, Scored]]], number: int) -> Any:
    def some(*arguments: Any) -> Iterator[tuple[int, Scored]]:
        for count, found in enumerate(scores(*arguments)):
            if count == number:
                raise Died
            yield found

    return some


def test_an_evaluation_that_died_goes_on_from_its_cache(
    ours: CoppiceLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(cache_dir=str(tmp_path), max_batch_tokens=64)
    monkeypatch.setattr(first.evaluator, "scores", dying_after(first.evaluator.scores, 20))
    with pytest.raises(Died):
        first.loglikelihood(PAIRS[:40])
    again = load(cache_dir=str(tmp_path))
    found, whole = again.loglikelihood(PAIRS[:40]), ours.loglikelihood(PAIRS[:40])
    for number in (0, 1):  # log-probabilities, and whether they are greedy's
        assert [f[number] for f in found] == pytest.approx([w[number] for w in whole], abs=1e-4)
    assert 20 <= again.evaluator.counts.kept < 40
    assert 0 < again.evaluator.counts.computed_tokens < ours.evaluator.counts.computed_tokens
    again.loglikelihood(PAIRS[:40])
    assert again.evaluator.counts.kept == 40
    said = {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}
    texts = requests_of("generate_until", *[("a", said)] * 3, ("b", {"until": ["\n"]}))
    drawn = again.generate_until(texts)
    assert load(cache_dir=str(tmp_path)).generate_until(texts) == drawn
    other = load(cache_dir=str(tmp_path), fidelity="strict")
    other.loglikelihood(PAIRS[:2])
    assert other.evaluator.counts.kept == 0  # what could differ in a bit is another result


def test_a_cache_that_is_no_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="results cannot be kept in"):
        KeptResults(tmp_path, {})
    with pytest.raises(StorageError, match="results cannot be kept in"):
        KeptResults(tmp_path / "results.sqlite" / "below", {})


def test_keys_tell_requests_apart(tmp_path: Path) -> None:
    kept = KeptResults(tmp_path, {"model": "a"})
    keys = [kept.key(*parts) for parts in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""))]
    keys.append(KeptResults(tmp_path, {"model": "b"}).key(b"ab", b"c"))
    assert len(set(keys)) == 5


_WITHOUT_REAL_TASKS = """
import os, signal, sys
from lm_eval.tasks import TaskManager
from functools import partialmethod
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
from kvcoppice.lm_eval import main
"""
"""The harness reads 14,000 files to know its own tasks, for half a minute."""
_KILLING = """
from kvcoppice.evaluation.kept_results import KeptResults
keep, kept = KeptResults.keep, []
def count(self, key, result):
    keep(self, key, result)
    kept.append(key)
    if len(kept) == 50:
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
KeptResults.keep = count
"""


def command(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{_WITHOUT_REAL_TASKS}{first}main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_the_command_evaluates_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    for name in ("mmlu", "bbh"):
        config = task(name, tmp_path / "data")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = (
        "--model", "coppice", "--tasks", "small_mmlu,small_bbh", "--include_path", str(tmp_path),
        "--model_args",
        f"pretrained={MODEL},dtype=float32,threads=1,cache_dir={tmp_path / 'kept'}",
        "--batch_size", "8", "--device", "cpu", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    killed = command(*arguments, first=_KILLING)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "small_mmlu" in done.stdout and "exact_match" in done.stdout
    assert "48 requests, 48 kept from before" in done.stderr  # mmlu was scored before
    assert "12 requests, 2 kept from before" in done.stderr  # and two answers were there
    assert "batch_size changes nothing" in done.stderr
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert results["config"]["coppice"]["kvcoppice"]


def test_the_command_says_what_it_refuses_in_a_sentence(tmp_path: Path) -> None:
    config = task("mmlu", tmp_path / "data")
    (tmp_path / "mmlu.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = command(
        "--model", "coppice", "--tasks", "small_mmlu", "--include_path", str(tmp_path),
        "--model_args", f"pretrained={MODEL},kv_budgte=1GiB",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "coppice: model_args: unknown setting 'kv_budgte'; did you mean kv_budget" in done.stderr


def test_the_module_is_the_command_of_the_harness() -> None:
    asked = [sys.executable, "-m", "kvcoppice.lm_eval", "run", "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "--include_path" in done.stdout


def test_the_own_cache_of_the_harness_knows_what_came_before_a_stop(tmp_path: Path) -> None:
    lm = load()
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.evaluator, "scores", dying_after(lm.evaluator.scores, 20))
        with pytest.raises(Died):
            cached.loglikelihood(PAIRS[:40])
    cached.loglikelihood(PAIRS[:40])
    assert lm.evaluator.counts.asked == 20
    cached.dbdict.close()
