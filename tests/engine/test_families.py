"""Families of models: each equals its own eager attention, or is refused in a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from pipeline.engine import attention, native_forward
from pipeline.engine.base import NO_HOOKS, EngineHooks, RunControl
from pipeline.engine.kernels import partial
from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.self_test import self_test
from pipeline.errors import EngineError, ModelError
from pipeline.model import families as support
from pipeline.model.model import LoadedModel, load_model
from pipeline.model.shape import read_shape
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.settings import EngineSettings, ModelSettings
from tests.engine import families, tiny
from tests.engine.families import FAMILIES, REFUSED, Family, Refused
from tests.sweeps import sweep

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
PARAMS = (tiny.GREEDY, tiny.LONGER, tiny.SAMPLED)
BY_ID = {family.id: family for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
some_families = pytest.mark.parametrize(
    "family", families.some_quick(FAMILIES), ids=lambda family: family.id
)


def random_plan(rows: int = 12) -> Plan:
    """Prefixes of up to 40 tokens, prompts of up to 70, answers of up to 9."""
    draw = random.Random(1)
    prompts = tiny.random_prompts(draw, rows)
    return tiny.plan_of(prompts, PARAMS, [draw.choice([0, 0, 1, 2]) for _ in prompts])


def generate(
    engine: PrefixEngine | NaiveEngine, plan: Plan, hooks: EngineHooks = NO_HOOKS
) -> dict[int, Completion]:
    every = np.arange(len(plan.sequences))
    return {c.sequence: c for c in engine.generate(plan, every, RunControl(), hooks)}


def worst_difference(loaded: LoadedModel, plan: Plan, kernels: Literal["auto", "torch"]) -> float:
    """Of any logit that chose a token from eager attention's, as a share of the largest one."""
    settings = EngineSettings(max_batch_tokens=64, max_rows=7, kernels=kernels)
    engine = PrefixEngine(loaded, settings)
    hooks, seen = tiny.watch_logits()
    done = generate(engine, plan, hooks)
    assert len(done) == len(plan.sequences)
    use_plain_torch(loaded)
    differences, largest = [], []
    for sequence, completion in done.items():
        prompt = plan.prompt_token_ids(sequence).tolist()
        ids = torch.tensor([[*prompt, *completion.token_ids[:-1]]])
        with torch.inference_mode():
            expected = loaded.model(ids, use_cache=False).logits[0, len(prompt) - 1 :]
        got = torch.stack([seen[sequence, i] for i in range(len(completion.token_ids))])
        differences.append((got - expected).abs().max())
        largest.append(expected.abs().max())
    return float(torch.stack(differences).max() / torch.stack(largest).max())


def use_plain_torch(loaded: LoadedModel) -> None:
    """Attention and experts in the words of the model's own file."""
    loaded.model.set_attn_implementation("eager")
    loaded.model.set_experts_implementation("eager")


@pytest.mark.parametrize(
    ("family", "kernels"),
    [*((family, "auto") for family in FAMILIES), *families.some_quick(FAMILIES, "torch")],
    ids=lambda value: getattr(value, "id", value),
)
def test_every_logit_equals_eager_attention(
    family: Family, kernels: Literal["auto", "torch"]
) -> None:
    loaded = families.load(family)
    assert worst_difference(loaded, random_plan(), kernels) < family.bound


@some_families
def test_tokens_equal_the_naive_engine(family: Family) -> None:
    """Decoding there runs by transformers' own cache, which drops what left the window."""
    loaded, plan = families.load(family), random_plan(rows=6)
    ours = generate(PrefixEngine(loaded, EngineSettings()), plan)
    plain = generate(NaiveEngine(loaded), plan)
    assert {s: c.token_ids for s, c in ours.items()} == {s: c.token_ids for s, c in plain.items()}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@some_families
def test_bfloat16_passes_the_test_at_load(
    family: Family, kernels: Literal["auto", "torch"]
) -> None:
    loaded = families.load(family, torch.bfloat16)
    assert self_test(PrefixEngine(loaded, EngineSettings(kernels=kernels))) >= 0.0


def altered(change: Callable[[AttentionRules], AttentionRules]) -> Callable[..., AttentionRules]:
    return lambda *values, **names: change(AttentionRules(*values, **names))


def one_token_more(rules: AttentionRules) -> AttentionRules:
    return replace(rules, window=rules.window + 1) if rules.window else rules


def no_softcap(rules: AttentionRules) -> AttentionRules:
    return replace(rules, softcap=0.0)


def no_sinks(rules: AttentionRules) -> AttentionRules:
    return replace(rules, sinks=None)


def another_scale(rules: AttentionRules) -> AttentionRules:
    return replace(rules, scale=0.25)


WRONG_RULES = [
    *((family, one_token_more) for family in FAMILIES if family.options.get("sliding_window")),
    *((family, no_softcap) for family in FAMILIES if family.model_type == "gemma2"),
    *((family, no_sinks) for family in FAMILIES if family.model_type == "gpt_oss"),
    *((family, another_scale) for family in FAMILIES if family.name == "Granite"),
]
ONE_OF_EACH = list({change: (family, change) for family, change in WRONG_RULES}.values())


@pytest.mark.parametrize(
    ("family", "change"), sweep(WRONG_RULES, ONE_OF_EACH), ids=lambda x: getattr(x, "id", "")
)
def test_a_wrong_rule_is_seen(
    family: Family,
    change: Callable[[AttentionRules], AttentionRules],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the comparison above would say nothing about this family's windows, caps and sinks."""
    for module in (attention, native_forward):
        monkeypatch.setattr(module, "AttentionRules", altered(change))
    assert worst_difference(families.load(family), random_plan(), "auto") > 100 * family.bound


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_test_at_load_crosses_a_window(
    kernels: Literal["auto", "torch"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual prompts have 40 tokens; this window is wider."""
    mistral = BY_ID["mistral, window"]
    mistral = replace(mistral, options=mistral.options | {"sliding_window": 100})
    engine = PrefixEngine(families.load(mistral), EngineSettings(kernels=kernels))
    assert self_test(engine) < 1e-5
    for module in (attention, native_forward):
        unlimited = altered(lambda rules: replace(rules, window=0))
        monkeypatch.setattr(module, "AttentionRules", unlimited)
    engine = PrefixEngine(families.load(mistral), EngineSettings(kernels=kernels))
    with pytest.raises(EngineError, match="reuse would be unsound"):
        self_test(engine)


def test_the_test_at_load_sees_a_wrong_merge_behind_a_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Single tokens may differ there, where rounding picks another expert; whole rows may not."""
    loaded = families.load(BY_ID["mixtral, no window"], torch.bfloat16)
    monkeypatch.setattr(partial, "merge", lambda *parts: None)
    with pytest.raises(EngineError, match="reuse would be unsound"):
        self_test(PrefixEngine(loaded, EngineSettings(kernels="torch")))


def test_kv_of_another_shape_than_promised_is_an_error() -> None:
    loaded = families.load(BY_ID["gpt2, learned positions"])
    wrong = replace(loaded, shape=replace(loaded.shape, num_kv_heads=2))
    with pytest.raises(EngineError, match="layer 0 made KV of 4 heads x 16.*promised 2 x 16"):
        self_test(PrefixEngine(wrong, EngineSettings(kernels="torch")))


@every_family
def test_context_length_is_read(family: Family, tmp_path: Path) -> None:
    family.config().save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)).context_length == 256


def test_heads_that_differ_by_layer_are_read_as_the_largest(tmp_path: Path) -> None:
    config = Refused("Gemma-4", "gemma4_text", "").config()
    config.save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)).head_dim == max(c.head_dim for c in config.per_layer_config)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_refusals_say_why(refused: Refused) -> None:
    assert refused.says in families.reason_against(refused)


@pytest.mark.parametrize(
    "refused", [r for r in REFUSED if r.is_tiny], ids=lambda refused: refused.name
)
def test_what_is_refused_runs_by_the_naive_engine(refused: Refused, tmp_path: Path) -> None:
    """As the sentence promises."""
    families.build(refused.config()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="--engine naive"):
        load_model(ModelSettings(model=str(tmp_path), device="cpu"))
    naive = NaiveEngine(
        load_model(ModelSettings(model=str(tmp_path), device="cpu", engine="naive"))
    )
    answer = naive.generate_one([5, 6, 7, 8], tiny.LONGER)
    assert naive.replay([5, 6, 7, 8], answer, tiny.LONGER, 0).predicted.tolist() == list(answer)


def test_a_family_without_fused_attention_loads(tmp_path: Path) -> None:
    families.build(BY_ID["gpt_oss, sinks, window in some layers"].config()).save_pretrained(
        tmp_path
    )
    loaded = load_model(ModelSettings(model=str(tmp_path), device="cpu"))
    assert self_test(PrefixEngine(loaded, EngineSettings())) < 1e-5


def test_native_forward_takes_no_config_that_it_does_not_compute() -> None:
    known = {f.id for f in FAMILIES if native_forward.knows(f.config())}
    assert known == {f.id for f in FAMILIES if f.model_type in native_forward.FAMILIES} - {
        "llama, yarn rotary, GELU"
    }


def test_every_admitted_family_is_in_the_table() -> None:
    assert {f.model_type for f in FAMILIES} == set(support.FAMILIES)
    assert len(BY_ID) == len(FAMILIES)
    assert all(support.why_unsupported(f.config()) is None for f in FAMILIES)


def test_the_page_is_the_table() -> None:
    """`python -m tests.engine.families > docs/families.md` brings it up to date."""
    assert PAGE.read_text() == families.page()
