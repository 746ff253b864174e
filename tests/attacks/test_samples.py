"""Samples of rows however a job is cut, killed or written: always those of one undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.errors import CoppiceError, EngineError, UsageError
from pipeline.inputs.conversion import convert
from pipeline.location import Location
from pipeline.records import Completion, Timing
from pipeline.run import plan_job, retry_job, run_job
from pipeline.settings import AuditSettings, JobSettings
from tests.tiny_job import answers, write_model, write_prompts

PROMPTS = [f"{'one common beginning of all, ' * (i % 3)}number {i}?" for i in range(7)]
COUNTS = [3, 1, 5, 2, 4, 1, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sampled") / "model")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = [
        json.dumps({"n": n, "stop": "q", "logprobs": 2} if i % 2 else {"n": n})
        for i, n in enumerate(COUNTS)
    ]
    folder = tmp_path_factory.mktemp("rows")
    tenants = ["a", "b", "a", None, "b", "a", None]
    return write_prompts(folder / "p.parquet", PROMPTS, sampling_params=cells, tenant=tenants)


def of(model: Path, **flat: Any) -> JobSettings:
    said = {"temperature": 1.0, "max_new_tokens": 6, "dtype": "float32", "fail_on_error": "100%"}
    return JobSettings.from_flat({"model": str(model)} | said | flat)


Said = dict[str, list[tuple[str, str, tuple[int, ...]]]]


def samples_of(*outputs: Path) -> Said:
    """Of each row its samples: text, why it ended, ids."""
    found: Said = {}
    for output in outputs:
        for row in answers(output).iter_rows(named=True):
            assert row["status"] == "ok", row["error_message"]
            said = row.get("samples") or [row]
            names = ("generated_text", "finish_reason", "completion_token_ids")
            several = [tuple(one[name] for name in names) for one in said]
            kept = [(text, why, tuple(ids)) for text, why, ids in several]
            found.setdefault(row["id"], []).extend(kept)
    return found


@pytest.fixture(scope="module")
def truth(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    output = tmp_path_factory.mktemp("truth") / "out"
    outcome = run_job(str(source), output, of(model))
    assert outcome.counters["prefilled_tokens"] == outcome.counters["unique_tokens"]
    found = samples_of(output)
    assert [len(said) for said in found.values()] == COUNTS
    assert len({said for some in found.values() for said in some}) > sum(COUNTS) // 2
    return found


class _Dying:
    """An engine that dies before the answer of this number."""

    def __init__(self, engine: Engine, after: int) -> None:
        self._engine, self._after = engine, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any) -> Iterator[Completion]:
        for number, done in enumerate(self._engine.generate(*arguments)):
            if number == self._after:
                raise EngineError("the device is gone")
            yield done


def dying(after: int) -> Callable[[JobSettings], Any]:
    return lambda settings: _Dying(make_engine(settings), after)


WAYS: list[dict[str, Any]] = [
    {"max_rows": 1},
    {"max_rows": 4, "max_batch_tokens": 16},
    {"rows_per_part": 1},
    {"rows_per_part": 2, "preserve_order": True},
    {"explode": True},
    {"explode": True, "rows_per_part": 3, "preserve_order": True},
    {"engine": "naive"},
    {"kv_budget": "60KiB"},
    {"min_prefix_tokens": 1},
    {"kernels": "torch", "threads": 1},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_samples_are_the_same_however_they_are_computed_and_written(
    model: Path, source: Path, truth: Said, tmp_path: Path, way: dict[str, Any]
) -> None:
    run_job(str(source), tmp_path / "out", of(model, **way))
    assert samples_of(tmp_path / "out") == truth


@pytest.mark.parametrize("explode", [False, True])
@pytest.mark.parametrize("preserve_order", [False, True])
def test_a_run_that_dies_within_a_row_s_samples_goes_on_with_the_same(
    model: Path, source: Path, truth: Said, tmp_path: Path, explode: bool, preserve_order: bool
) -> None:
    chosen = of(model, rows_per_part=2, explode=explode, preserve_order=preserve_order, max_rows=2)
    for after in (0, 1, 2, 3, 4, 5, 7, 6, 5):
        try:
            run_job(str(source), tmp_path / "out", chosen, make_engine=dying(after))
        except EngineError:
            continue
        break
    run_job(str(source), tmp_path / "out", chosen)
    assert samples_of(tmp_path / "out") == truth
    if explode:
        rows = answers(tmp_path / "out")
        found = rows.select("row_index", "sample_index").rows()
        assert len(set(found)) == len(found) == sum(COUNTS)


def test_shards_have_the_samples_of_the_whole(
    model: Path, source: Path, truth: Said, tmp_path: Path
) -> None:
    outputs = [tmp_path / f"out{shard}" for shard in range(3)]
    for shard, output in enumerate(outputs):
        run_job(str(source), output, of(model, num_shards=3, shard=shard))
    assert samples_of(*(output for output in outputs if answers(output).height)) == truth


class _Losing:
    """An engine that has no room for some sequences."""

    def __init__(self, engine: Engine, failing: set[tuple[int, int]]) -> None:
        self._engine, self._failing = engine, failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, plan: Any, *others: Any) -> Iterator[Completion]:
        for done in self._engine.generate(plan, *others):
            failed = Completion(done.sequence, (), "error", 0, Timing(), "OutOfMemory", "no room")
            at = (plan.sequences.row, plan.sequences.sample)
            row, sample = (int(numbers[done.sequence]) for numbers in at)
            yield failed if (row, sample) in self._failing else done


@pytest.mark.parametrize("explode", [False, True])
def test_a_row_one_of_whose_samples_fails_is_retried_as_it_would_have_been(
    model: Path, source: Path, truth: Said, tmp_path: Path, explode: bool
) -> None:
    output, failing = tmp_path / "out", {(2, 4), (0, 0), (4, 1)}
    chosen = of(model, rows_per_part=2, explode=explode)
    run_job(
        str(source), output, chosen,
        make_engine=lambda settings: _Losing(make_engine(settings), failing),
    )  # fmt: skip
    rows = answers(output)
    failed = rows.filter(pl.col("status") == "error")
    assert failed["id"].to_list() == ["r0", "r2", "r4"]
    if explode:
        assert failed["sample_index"].to_list() == [0, 0, 0]
    retry_job(Location(str(output)), {})
    assert samples_of(output) == truth
    assert answers(output).filter(pl.col("id") == "r2")["attempts"].to_list()[0] == 2


@pytest.mark.parametrize("explode", [False, True])
def test_samples_are_audited(model: Path, source: Path, tmp_path: Path, explode: bool) -> None:
    run_job(str(source), tmp_path / "out", of(model, explode=explode))
    verdict = audit_run(Location(str(tmp_path / "out")), AuditSettings(audit_sample="100%"))
    assert verdict.passed, verdict.reasons
    assert verdict.rows_audited == len(PROMPTS)


def test_a_response_has_every_sample_with_its_log_probabilities(
    model: Path, tmp_path: Path
) -> None:
    asked = {"temperature": 1, "max_tokens": 5, "n": 3}
    bodies = [
        {"prompt": "tell me", "logprobs": 2, **asked},
        {"prompt": "tell me", "logprobs": 0, **asked, "n": 1},
        {"prompt": ["tell me"], **asked, "best_of": 3},
    ]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_job(str(tmp_path / "in.jsonl"), tmp_path / "out", of(model))
    convert(Location(str(tmp_path / "out")), Location(str(tmp_path / "r.jsonl")))
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    first, second, third = (line["response"]["body"] for line in found)
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    for choice in first["choices"]:
        said = choice["logprobs"]
        assert "".join(said["tokens"]).startswith(choice["text"])
        assert all(len(top) == 2 for top in said["top_logprobs"])
        assert len(said["tokens"]) == len(said["token_logprobs"]) == len(said["text_offset"])
    count = second["usage"]["completion_tokens"]
    assert second["choices"][0]["logprobs"]["top_logprobs"] == [{}] * count
    assert [choice["logprobs"] for choice in third["choices"]] == [None] * 3
    assert first["usage"]["completion_tokens"] == sum(
        len(choice["logprobs"]["tokens"]) for choice in first["choices"]
    )


@pytest.mark.parametrize("n", [0, -1, 16_385, 10**6, 2**40, 1.5, True, "x"])
def test_a_number_of_samples_that_cannot_be_is_refused_by_name(
    model: Path, source: Path, tmp_path: Path, n: Any
) -> None:
    with pytest.raises(UsageError, match="setting n: "):
        of(model, n=n)
    cells = [json.dumps({"n": n, "temperature": 1.0}), None]
    path = write_prompts(tmp_path / "p.parquet", ["a", "b"], sampling_params=cells)
    run_job(str(path), tmp_path / "out", of(model))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["error", "ok"]
    assert rows["error_message"][0].startswith("n ")


def test_samples_of_a_greedy_job_are_refused_before_a_row_is_read(
    model: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="n is 2, but a temperature of 0"):
        run_job(str(source), tmp_path / "out", of(model, n=2, temperature=0.0))
    assert not (tmp_path / "out").exists()


def test_more_answers_than_can_be_planned_are_one_sentence(model: Path, tmp_path: Path) -> None:
    """A million rows of 16,384 samples would be 120 GiB of plan."""
    path = write_prompts(tmp_path / "p.parquet", ["a"] * 140_000)
    with pytest.raises(CoppiceError, match="samples"):
        plan_job(str(path), of(model, n=16_384))


def test_the_card_names_the_columns_that_are_there_with_their_types(
    model: Path, source: Path, tmp_path: Path
) -> None:
    """Seen red: samples without their log-probabilities, and no `parsed`."""
    run_job(str(source), tmp_path / "out", of(model))
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("| `samples`"))
    assert "logprobs: list<" in line
    schema = {"type": "boolean"}
    plain = write_prompts(tmp_path / "p.parquet", ["what?"])
    flat = {"json_schema": json.dumps(schema), "max_new_tokens": 40}
    run_job(str(plain), tmp_path / "formed", of(model, **flat))
    assert "| `parsed` | bool |" in (tmp_path / "formed" / "README.md").read_text()


@pytest.mark.parametrize("explode", [False, True])
def test_samples_that_must_have_a_form_are_audited(
    model: Path, tmp_path: Path, explode: bool
) -> None:
    """Seen red: faults were planted in greedy answers of rows that still asked for several."""
    source = write_prompts(tmp_path / "p.parquet", list(PROMPTS[:4]))
    asked = {"regex": "(yes|no), [a-d]{2,5}", "n": 3, "logprobs": 1, "max_new_tokens": 12}
    run_job(str(source), tmp_path / "out", of(model, explode=explode, **asked))
    verdict = audit_run(Location(str(tmp_path / "out")), AuditSettings(audit_sample="100%"))
    assert verdict.passed, verdict.reasons
