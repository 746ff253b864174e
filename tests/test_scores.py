"""Scores of a table from the command to the output, against a full forward of each request."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import kvcoppice
from pipeline.cli.app import app
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.job.job import open_job
from pipeline.job.planning import plan_rows
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.job.prepare_scores import ScorePreparation, windows
from pipeline.run import plan_job, run_job, validate_input
from pipeline.settings import JobSettings
from pipeline.tokens.pairs import Pair
from tests.tiny_job import answers, write_model, write_prompts

Row = dict[str, Any]
CHOICES = [[" yes", " no"], [" yes", " no", " nobody"], ["es"], [" no", " yes", " no"]]


def settings_of(model: Path, **flat: Any) -> JobSettings:
    return JobSettings.from_flat({"model": str(model), "dtype": "float32"} | flat)


def write_rows(path: Path, rows: int = 12) -> Path:
    prompts: list[str | None] = [
        f"yes or no? {'a plum is a fruit' if i % 2 else 'stones are soft'} {i % 5}:{' ' * (i % 3)}"
        for i in range(rows)
    ]
    return write_prompts(path, prompts, choices=[CHOICES[i % 4] for i in range(rows)])


@cache
def loaded(model: str) -> tuple[Any, Any]:
    return (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
    )


def expected(model: Path, context: str, continuation: str) -> tuple[float, int, bool]:
    """(log-likelihood, tokens, greedy) as lm-evaluation-harness has it."""
    tokenizer, network = loaded(str(model))
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    ids = tokenizer(context)["input_ids"]
    tail = tokenizer(context + continuation)["input_ids"][len(ids) :]
    if not context:
        ids, tail = [tokenizer.eos_token_id], tokenizer(continuation)["input_ids"]
    return forward(network, ids, tail)


def forward(network: Any, ids: list[int], tail: list[int]) -> tuple[float, int, bool]:
    with torch.inference_mode():
        logits = network(torch.tensor([ids + tail[:-1]])).logits[0, len(ids) - 1 :].double()
    logprobs = torch.log_softmax(logits, -1)[range(len(tail)), tail]
    return float(logprobs.sum()), len(tail), logits.argmax(-1).tolist() == tail


def check_row(model: Path, row: Row) -> None:
    found = [expected(model, row["prompt"], text) for text in row["choices"]]
    values = [value for value, _, _ in found]
    assert row["loglikelihoods"] == pytest.approx(values, abs=1e-4)
    assert row["token_counts"] == [tokens for _, tokens, _ in found]
    assert row["greedy"] == [greedy for *_, greedy in found]
    blanks = len(row["prompt"]) - len(row["prompt"].rstrip())
    assert row["byte_counts"] == [blanks + len(text.encode()) for text in row["choices"]]
    best = max(range(len(values)), key=lambda i: (round(values[i], 5), -i))
    assert (row["choice_index"], row["choice"]) == (best, row["choices"][best])
    weights = [math.exp(value - max(values)) for value in values]
    assert row["probabilities"] == pytest.approx([w / sum(weights) for w in weights], abs=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("scores") / "model", sharpness=3.0)


def test_a_table_of_choices_is_scored(model: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.parquet"), tmp_path / "out"
    outcome = run_job(str(source), output, settings_of(model, choices_column="choices"))
    rows = answers(output)
    assert outcome.counters["rows_ok"] == len(rows) == 12
    for row in rows.iter_rows(named=True):
        assert row["status"] == "ok" and row["generated_text"] is None
        check_row(model, row)
    prompt, cached = (sum(rows[name].to_list()) for name in ("prompt_tokens", "cached_tokens"))
    assert outcome.counters["prompt_tokens"] == prompt
    assert outcome.counters["prefilled_tokens"] == outcome.counters["unique_tokens"]
    assert prompt - cached == outcome.counters["unique_tokens"]
    assert outcome.counters["generated_tokens"] == 0


@pytest.mark.parametrize("flat", [{"engine": "naive"}, {"fidelity": "strict"}])
def test_other_ways_of_computing_agree(model: Path, tmp_path: Path, flat: dict[str, Any]) -> None:
    source, output = write_rows(tmp_path / "in.parquet", 5), tmp_path / "out"
    run_job(str(source), output, settings_of(model, choices_column="choices", **flat))
    for row in answers(output).iter_rows(named=True):
        check_row(model, row)


def test_the_same_choices_for_every_row(model: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", ["is it?", "was it?", "is it?", ""])
    output = tmp_path / "out"
    run_job(str(source), output, settings_of(model, choices="y,n"))
    rows = answers(output)
    for row in rows.iter_rows(named=True):
        check_row(model, row | {"choices": ["y", "n"]})
        values = row["loglikelihoods"]
        assert row["label_mass"] == pytest.approx(sum(map(math.exp, values)))
    assert rows["dedup_of"].to_list() == [None, None, "r0", None]
    assert rows["cached_tokens"][2] == rows["prompt_tokens"][2]


def test_one_continuation_of_a_column(model: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", ["ab", "abc"], gold=["c", " def"])
    output = tmp_path / "out"
    run_job(str(source), output, settings_of(model, continuation_column="gold"))
    for row in answers(output).iter_rows(named=True):
        check_row(model, row | {"choices": [row["gold"]]})
        assert row["probabilities"] == [1.0] and row["choice"] == row["gold"]


@pytest.mark.parametrize("by", ["tokens", "bytes"])
def test_choices_are_compared_by_their_means(model: Path, tmp_path: Path, by: str) -> None:
    source, output = write_rows(tmp_path / "in.parquet"), tmp_path / "out"
    asked = settings_of(model, choices_column="choices", normalize=by)
    run_job(str(source), output, asked)
    counts = {"tokens": "token_counts", "bytes": "byte_counts"}[by]
    for row in answers(output).iter_rows(named=True):
        means = [v / n for v, n in zip(row["loglikelihoods"], row[counts], strict=True)]
        weights = [math.exp(mean - max(means)) for mean in means]
        assert row["choice_index"] == means.index(max(means))
        assert row["probabilities"] == pytest.approx([w / sum(weights) for w in weights])


def test_prompts_have_a_perplexity_over_windows(model: Path, tmp_path: Path) -> None:
    texts: list[str | None] = ["ab", "hello world " * 9, "hello there " * 31, "a" * 128, "b" * 129]
    source, output = write_prompts(tmp_path / "in.parquet", texts), tmp_path / "out"
    outcome = run_job(str(source), output, settings_of(model, prompt_logprobs=True))
    tokenizer, network = loaded(str(model))
    assert outcome.counters["prefilled_tokens"] == outcome.counters["unique_tokens"]
    for row in answers(output).iter_rows(named=True):
        ids = [tokenizer.eos_token_id, *tokenizer(row["prompt"])["input_ids"]]
        total, low = 0.0, 1
        while low < len(ids):  # 128 tokens of context
            high = min(low + 128, len(ids))
            first = max(0, high - 129)
            total += forward(network, ids[first:low], ids[low:high])[0]
            low = high
        tokens = len(row["prompt"])
        assert row["loglikelihoods"] == pytest.approx([total], abs=1e-3)
        assert row["token_counts"] == row["byte_counts"] == [tokens]
        assert row["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
        assert row["choice"] is row["probabilities"] is row["label_mass"] is None


def test_a_resumed_job_gives_the_same_table(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet", 20)
    asked = settings_of(model, choices_column="choices", rows_per_part=3, stall_timeout="never")
    run_job(str(source), tmp_path / "whole", asked)

    def failing(settings: JobSettings) -> Engine:
        return _Failing(make_engine(settings))

    with pytest.raises(OSError, match="cut off"):
        run_job(str(source), tmp_path / "out", asked, make_engine=failing)
    done = len(answers(tmp_path / "out"))
    assert 0 < done < 20
    run_job(str(source), tmp_path / "out", asked)
    columns = ["id", "choice", "loglikelihoods", "token_counts", "note"][:4]
    a, b = (answers(tmp_path / name).select(columns) for name in ("whole", "out"))
    for one, other in zip(a.iter_rows(), b.iter_rows(), strict=True):
        assert one[:2] == other[:2] and one[3] == other[3]
        assert one[2] == pytest.approx(other[2], abs=1e-5)


class _Failing:
    """Another engine that stops in the middle."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any) -> Any:
        for number, completion in enumerate(self._engine.generate(*arguments)):
            if number == 17:
                raise OSError("cut off")
            yield completion


def test_shards_score_every_row_once(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet", 20)
    found = []
    for shard in range(3):
        asked = settings_of(model, choices_column="choices", num_shards=3, shard=shard)
        run_job(str(source), tmp_path / str(shard), asked)
        found.append(answers(tmp_path / str(shard)))
    rows = pl.concat(found)
    assert sorted(rows["row_index"]) == list(range(20))
    for row in rows.iter_rows(named=True):
        check_row(model, row)


def test_the_plan_says_what_scoring_costs(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet")
    planned = plan_job(str(source), settings_of(model, choices_column="choices"))
    scores = planned.summary.scores
    assert planned.plan.scores is not None and scores is not None
    assert planned.summary.rows == 12 and planned.summary.max_new_tokens == 0
    assert scores["requests"] == 27
    rows = pl.read_parquet(source).select("prompt", "choices").explode("choices").rows()
    pairs = {(text.rstrip(), text[len(text.rstrip()) :] + choice) for text, choice in rows}
    assert scores["contexts"] == len({context for context, _ in pairs})
    assert scores["continuations"] == len(pairs)
    assert scores["resent_tokens"] == planned.summary.prompt_tokens
    assert scores["scored_positions"] == planned.plan.scores.num_points
    assert scores["resent_tokens"] > scores["resent_once_tokens"] > planned.summary.unique_tokens
    frame = planned.frame()
    assert sorted(frame["row_index"]) == list(range(12)) and frame["requests"].sum() == 27


def test_validate_shows_the_token_ids_of_the_first_choices(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet")
    found = validate_input(str(source), settings_of(model, choices_column="choices"))
    tokenizer, _ = loaded(str(model))
    shown = found["first"]["continuations"]
    assert [piece["text"] for piece in shown] == CHOICES[0]
    assert [piece["token_ids"] for piece in shown] == tokenizer(CHOICES[0])["input_ids"]


def test_strict_mode_gives_the_same_bits_in_any_order(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet", 16)
    pl.read_parquet(source).sample(fraction=1.0, shuffle=True, seed=1).write_parquet(
        tmp_path / "shuffled.parquet"
    )
    found = []
    for name in ("in", "shuffled"):
        asked = settings_of(model, choices_column="choices", fidelity="strict", max_batch_tokens=64)
        run_job(str(tmp_path / f"{name}.parquet"), tmp_path / name, asked)
        found.append(answers(tmp_path / name).sort("id").select("id", "loglikelihoods"))
    assert found[0].equals(found[1])


def test_the_api_and_the_command_score_the_column_of_choices(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet", 4)
    result = kvcoppice.score(source, tmp_path / "api", model=model, dtype="float32")
    for row in result.answers().collect().iter_rows(named=True):
        check_row(model, row)
    assert result.audit(audit_sample="100%").passed
    command = ["score", str(source), "-o", str(tmp_path / "cli"), "--model", str(model)]
    done = CliRunner().invoke(app, [*command, "--dtype", "float32", "--progress", "none"])
    assert done.exit_code == 0, done.output
    columns = ["id", "choice", "loglikelihoods"]
    again = answers(tmp_path / "cli").select(columns)
    assert again.equals(answers(tmp_path / "api").select(columns))


def test_kv_of_an_earlier_run_is_loaded_where_nothing_is_read(model: Path, tmp_path: Path) -> None:
    prompts: list[str | None] = [f"{'the same shots ' * 5}{i} is it?" for i in range(8)]
    source = write_prompts(tmp_path / "in.parquet", prompts)
    store = tmp_path / "store"
    loaded_tokens = []
    for name in ("first", "second"):
        asked = settings_of(model, choices="y,n", kv_store=store)
        outcome = run_job(str(source), tmp_path / name, asked)
        loaded_tokens.append(outcome.counters["loaded_tokens"])
        for row in answers(tmp_path / name).iter_rows(named=True):
            check_row(model, row | {"choices": ["y", "n"]})
    assert loaded_tokens[0] == 0


def test_a_plan_that_was_killed_goes_on_from_its_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_rows(tmp_path / "in.parquet", 20)
    job = open_job(str(source), settings_of(model, choices_column="choices"))
    whole = plan_rows(job)
    monkeypatch.setattr(Checkpoint, "every_rows", 3)
    kept = plan_rows(job, keep_rows=True)
    (folder,) = (tmp_path / "cache" / "coppice" / "plans").iterdir()
    assert (folder / "state.json").exists()
    monkeypatch.setattr(ScorePreparation, "prepare", None)  # nothing is tokenised again
    again = plan_rows(job)
    assert whole.summary.plan_hash == kept.summary.plan_hash == again.summary.plan_hash
    assert again.requests is not None and whole.requests is not None
    assert again.requests.num_bytes.tolist() == whole.requests.num_bytes.tolist()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 24, 25, 40])
def test_windows_score_each_token_once_as_lm_eval_does(length: int) -> None:
    """`get_rolling_token_windows` and `make_disjoint_window` of lm-evaluation-harness."""
    most, tokens = 8, list(range(1, length + 1))
    expected = [([0], tokens[:most])]
    for low in range(most, length, most):
        high = min(low + most, length)
        expected.append((tokens[high - most - 1 : low], tokens[low:high]))
    pair = Pair(np.array([0], np.uint32), np.array(tokens, np.uint32), 99)
    found = windows(pair, most)
    assert [(p.context.tolist(), p.continuation.tolist()) for p in found] == expected
    assert sum(p.num_bytes for p in found) == 99
    assert all(len(p.context) + len(p.continuation) - 1 <= most for p in found)
    assert windows(pair, None) == [pair]


def test_parts_in_input_order_hold_rows_of_scores_in_it(model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet", 11)
    asked = settings_of(model, choices_column="choices", rows_per_part=4, preserve_order=True)
    run_job(str(source), tmp_path / "out", asked)
    parts = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    rows = [pl.read_parquet(part)["row_index"].to_list() for part in parts]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
