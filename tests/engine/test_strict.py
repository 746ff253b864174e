"""Strict mode: every logit of every row, bit for bit, against the row run alone without reuse."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.engine.base import RunControl
from pipeline.engine.forward import Forward
from pipeline.engine.kernels import native
from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.native_kernel import NativeKernel
from pipeline.engine.kernels.rules import AttentionRules, KVSpans, attend_reference
from pipeline.engine.kernels.strict_native_kernel import StrictNativeKernel
from pipeline.engine.kernels.strict_torch_kernel import StrictTorchKernel
from pipeline.engine.kernels.strict_work import StrictWork
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.load import make_engine
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.strict_probe import strict_probe
from pipeline.errors import UsageError
from pipeline.model.model import LoadedModel, load_model
from pipeline.plan.plan import Plan
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings, JobSettings, ModelSettings
from tests.engine import families, tiny
from tests.engine.attention_cases import Tree, random_layer, trees
from tests.sweeps import sweep

Bits = dict[tuple[int, int], Tensor]
"""Logits [V] by (sequence, output position)."""

ALL = (tiny.GREEDY, tiny.LONGER, tiny.SAMPLED)
LIMITS: list[dict[str, Any]] = [
    {},
    {"max_rows": 1},
    {"max_rows": 3, "max_batch_tokens": 16},
    {"max_batch_tokens": 300, "slots": 180},
]
CHOSEN = (
    "llama, grouped heads", "mistral, window", "gpt2, learned positions", "gpt_neox, heads of 24",
    "gemma2, soft-capped scores, window in some layers",
)  # fmt: skip
OTHERS = (
    "llama, yarn rotary, GELU", "qwen2, no window", "qwen3, window in some layers",
    "phi, partial rotary, norms of heads", "opt, norm after, projected embedding",
)  # fmt: skip
chosen = pytest.mark.parametrize("name", sweep(CHOSEN + OTHERS, CHOSEN))
needs_native = pytest.mark.skipif(
    native.why_unavailable() is not None, reason="the compiled kernels are not available"
)


def load(name: str) -> LoadedModel:
    return families.load(next(f for f in families.FAMILIES if f.id == name))


def forest(seed: int, min_prefix_tokens: int = 4) -> Plan:
    """Short and deep shared edges, prompts of one token, equal prompts, greedy and sampled rows."""
    draw = random.Random(seed)
    prompts = [[9], [10], [9, 10], *tiny.random_prompts(draw, rows=6)]
    deep = [draw.randrange(4, tiny.VOCABULARY) for _ in range(150)]
    prompts += [[*deep[:cut], 11 + cut % 7] for cut in (1, 2, 64, 127, 140, 140)]
    params = [i % 3 for i in range(len(prompts))]
    return tiny.plan_of(prompts, ALL, params, min_prefix_tokens)


def engine_for(loaded: LoadedModel, fidelity: str = "strict", **limits: Any) -> PrefixEngine:
    """`slots`: the KV budget in tokens."""
    slots = limits.pop("slots", None)
    budget = slots and slots * loaded.shape.kv_bytes_per_token()
    fields = {"fidelity": fidelity, "kv_budget": budget, **limits}
    return PrefixEngine(loaded, EngineSettings.model_validate(fields))


def bits(engine: PrefixEngine, plan: Plan, sequences: list[int] | None = None) -> Bits:
    hooks, seen = tiny.watch_logits()
    chosen = np.array(range(len(plan.sequences)) if sequences is None else sequences, np.int64)
    done = list(engine.generate(plan, chosen, RunControl(), hooks))
    assert all(c.error_type in (None, "KVBudgetExceeded") for c in done)
    return seen


def bits_alone(engine: PrefixEngine, plan: Plan) -> Bits:
    """Each row as a job of its own: the whole plan's other rows are not there to share with."""
    every: Bits = {}
    for sequence in range(len(plan.sequences)):
        prompt = plan.prompt_token_ids(sequence).astype(np.int64).tolist()
        params = plan.params[int(plan.sequences.params[sequence])]
        own = tiny.plan_of([prompt], (params,))
        own.sequences.noise_key[0] = plan.sequences.noise_key[sequence]
        every |= {(sequence, at): row for (_, at), row in bits(engine, own).items()}
    return every


def num_unequal(got: Bits, expected: Bits) -> int:
    """Logits that differ in a bit; both must hold the same rows unless a budget refused some."""
    assert got
    for sequence in {s for s, _ in got}:
        own = {key for key in expected if key[0] == sequence}
        assert own == {key for key in got if key[0] == sequence}, "another number of tokens"
    return sum(not torch.equal(got[key], expected[key]) for key in got)


@chosen
def test_no_bit_depends_on_what_runs_beside_a_row(name: str) -> None:
    """Went red when copies of short edges waited for the last tile of a forward, and in windows
    when the grid of key tiles began at the oldest key."""
    loaded, plan = load(name), forest(0)
    alone = bits_alone(engine_for(loaded), plan)
    for limits in LIMITS:
        assert num_unequal(bits(engine_for(loaded, **limits), plan), alone) == 0, limits


@pytest.mark.parametrize("name", ["llama, grouped heads", "gpt2, learned positions"])
def test_what_was_decoded_has_the_same_bits_when_it_is_prefilled_again(name: str) -> None:
    """Rows outgrow their first blocks all at once, and most give way."""
    loaded, stem = load(name), list(range(20, 40))
    params = SamplingParams(max_new_tokens=60, temperature=0.7, ignore_eos=True)
    plan = tiny.plan_of([[*stem, 5 + i, 6, 7, 8, 9] for i in range(7)], (params,))
    tight = engine_for(loaded, slots=250)
    expected = bits_alone(engine_for(loaded), plan)
    assert num_unequal(bits(tight, plan), expected) == 0
    assert tight.counters.recomputed_tokens > 100


def test_the_default_mode_shows_that_the_comparison_is_not_blind() -> None:
    loaded, plan = load("llama, grouped heads"), forest(0)
    alone = bits_alone(engine_for(loaded, "default"), plan)
    for limits in LIMITS:
        unequal = sum(
            not torch.equal(row, alone[key])
            for key, row in bits(engine_for(loaded, "default", **limits), plan).items()
            if key in alone
        )
        assert unequal > 10, limits


@pytest.mark.parametrize("min_prefix_tokens", [1, 1000])
def test_no_bit_depends_on_how_short_edges_are_shared(min_prefix_tokens: int) -> None:
    loaded = load("llama, grouped heads")
    plan = forest(1, min_prefix_tokens)
    alone = bits_alone(engine_for(loaded), plan)
    assert num_unequal(bits(engine_for(loaded), plan), alone) == 0


def test_a_resumed_part_of_the_rows_has_the_same_bits() -> None:
    loaded, plan = load("qwen2, no window"), forest(2)
    engine = engine_for(loaded, max_rows=5)
    whole = bits(engine, plan)
    for step in (2, 3):
        rest = list(range(1, len(plan.sequences), step))
        assert num_unequal(bits(engine, plan, rest), whole) == 0


def test_plain_torch_keeps_its_bits_too() -> None:
    loaded = load("mistral, window")
    plan = tiny.plan_of(tiny.random_prompts(random.Random(3), rows=8), (tiny.GREEDY,))
    alone = bits_alone(engine_for(loaded, kernels="torch"), plan)
    together = bits(engine_for(loaded, kernels="torch", max_rows=3), plan)
    assert num_unequal(together, alone) == 0


def test_the_demo_model_keeps_its_bits() -> None:
    folder = str(Path(__file__).parents[2] / "data" / "demo_model")
    settings = ModelSettings(model=folder, dtype="float32", device="cpu")
    loaded = load_model(settings)
    draw = np.random.default_rng(0)
    stem = draw.integers(4, tiny.VOCABULARY, 90).tolist()
    prompts = [
        [*stem[: 30 * (i % 4)], *draw.integers(4, tiny.VOCABULARY, 1 + i).tolist()]
        for i in range(12)
    ]
    params = (SamplingParams(max_new_tokens=6, ignore_eos=True),)
    plan = tiny.plan_of(prompts, params)
    alone = bits_alone(engine_for(loaded), plan)
    every: list[dict[str, Any]] = [{}, {"max_rows": 3, "max_batch_tokens": 48}]
    for limits in every:
        assert num_unequal(bits(engine_for(loaded, **limits), plan), alone) == 0


# ---------------------------------------------------------------- the kernels

RULES = [
    AttentionRules(0.3),
    AttentionRules(0.3, window=9),
    AttentionRules(0.3, softcap=2.0),
    AttentionRules(0.3, window=5, softcap=5.0, sinks=torch.linspace(-1.0, 2.0, 4)),
]


def strict_kernels() -> list[AttentionKernel]:
    compiled = [StrictNativeKernel()] if native.why_unavailable() is None else []
    return [StrictTorchKernel(), *compiled]


@given(trees(max_length=90), st.sampled_from(RULES), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_strict_kernels_mean_what_the_reference_means(
    tree: Tree, rules: AttentionRules, seed: int
) -> None:
    layer = random_layer(tree, (4, 2), 16, seed=seed)
    positions = torch.from_numpy(tree.positions)
    expected = attend_reference(layer.query, layer.keys, layer.values, positions, tree.spans, rules)
    for kernel in strict_kernels():
        work = kernel.prepare(tree.spans, tree.positions)
        out = kernel.attend(layer.query, layer.keys, layer.values, work, rules)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@given(trees(max_length=90), st.sampled_from(RULES), st.data())
@settings(max_examples=25, deadline=None)
def test_a_query_alone_with_its_spans_cut_has_the_same_bits(
    tree: Tree, rules: AttentionRules, data: st.DataObject
) -> None:
    """Seen red: one softmax a span, merged; a grid that began at the oldest key of a tile."""
    layer = random_layer(tree, (4, 2), 16)
    query = data.draw(st.integers(0, len(tree.positions) - 1))
    for kernel in strict_kernels():
        work = kernel.prepare(tree.spans, tree.positions)
        together = kernel.attend(layer.query, layer.keys, layer.values, work, rules)[query]
        part = StrictWork(tree.spans, tree.positions).part(query, query + 1, 1)
        cuts = [cut for row in part.spans for cut in cut_in_two(row, data)]
        alone = kernel.prepare(np.array(cuts, np.int64).reshape(-1, 5), part.positions)
        one = layer.query[query : query + 1]
        out = kernel.attend(one, layer.keys, layer.values, alone, rules)[0]
        assert torch.equal(out, together), kernel.name


def cut_in_two(span: KVSpans, data: st.DataObject) -> list[list[int]]:
    q_lo, q_hi, kv_lo, kv_hi, position = span.tolist()
    cut = data.draw(st.integers(kv_lo, kv_hi))
    halves = [[q_lo, q_hi, kv_lo, cut, position], [q_lo, q_hi, cut, kv_hi, position + cut - kv_lo]]
    return [half for half in halves if half[2] < half[3]]


def test_a_nan_is_not_hidden() -> None:
    keys, values = torch.randn(2, 40, 16), torch.randn(2, 40, 16)
    keys[:, 5] = float("nan")
    spans = np.array([[0, 3, 0, 12, 0]], np.int64)
    for kernel in strict_kernels():
        work = kernel.prepare(spans, np.array([8, 9, 10]))
        out = kernel.attend(torch.randn(3, 4, 16), keys, values, work, AttentionRules(0.3))
        assert out.isnan().all(), kernel.name


# ---------------------------------------------------------------- the probe


class Faulty:
    """A forward with a planted fault: what the logits gain by slot and number of tokens."""

    def __init__(self, inner: Forward, by_slot: float, by_size: float, by_call: float) -> None:
        self.name = "faulty"
        self._inner, self._by_slot, self._by_size = inner, by_slot, by_size
        self._by_call, self._calls = by_call, 0

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        self._calls += 1
        logits = self._inner(batch, cache, keep)
        gain = self._by_slot * keep.float().unsqueeze(1) * 1e-6
        gain = gain + self._by_size * (batch.input_ids.shape[1] > 64) * 1e-5
        return logits + gain + self._by_call * (self._calls > 1) * 1e-5


class SplitBySpan:
    """Attention that merges one softmax a span: exact in numbers, not in bits."""

    name = "split"

    def __init__(self, kernel: AttentionKernel) -> None:
        self._kernel = kernel

    def prepare(
        self, spans: KVSpans, positions: np.ndarray, owner: np.ndarray | None = None
    ) -> StrictWork:
        assert owner is None
        return StrictWork(spans, positions)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: StrictWork, rules: AttentionRules
    ) -> Tensor:
        planned = self._kernel.prepare(work.spans, work.positions)
        return self._kernel.attend(query, keys, values, planned, rules)


def with_faults(by_slot: float = 0, by_size: float = 0, by_call: float = 0) -> PrefixEngine:
    engine = engine_for(load("llama, grouped heads"))
    faulty = Faulty(engine.backend.forward, by_slot, by_size, by_call)
    return tiny.with_backend(engine, forward=faulty)


@chosen
def test_the_probe_passes_what_keeps_its_bits(name: str) -> None:
    assert strict_probe(engine_for(load(name))) > 3


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"by_call": 1.0}, "in the same call twice"),
        ({"by_slot": 1.0}, "at another slot"),
        ({"by_size": 1.0}, "in tiles of"),
    ],
)
def test_the_probe_catches_a_forward_that_does_not(fault: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=f"--fidelity strict: .*{says}"):
        strict_probe(with_faults(**fault))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_native)])
def test_the_probe_catches_attention_that_splits_its_softmax(compiled: bool) -> None:
    engine = engine_for(load("llama, grouped heads"))
    kernel = NativeKernel(4, 2) if compiled else TorchKernel(torch.device("cpu"))
    engine = tiny.with_backend(engine, kernel=SplitBySpan(kernel))
    with pytest.raises(UsageError, match="bits of this model's logits are not the same"):
        strict_probe(engine)


# ---------------------------------------------------------------- what is refused


def test_half_precision_is_refused_by_name() -> None:
    loaded = tiny.load_tiny(dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="float32 only, not for bfloat16"):
        engine_for(loaded)


def test_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="router"):
        engine_for(load("mixtral, no window"))


@pytest.mark.parametrize("engine", ["naive", "echo"])
def test_other_engines_are_refused(engine: str) -> None:
    flat = {"model": "nowhere", "engine": engine, "fidelity": "strict"}
    with pytest.raises(UsageError, match="prefix engine alone"):
        make_engine(JobSettings.from_flat(flat))
