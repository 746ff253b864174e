"""The forward of a GPU on a CPU: what Triton programs would compute, their slow meaning computes.

That the programs have this meaning is shown by `layer_cases`; here it is shown that a layer of each
family is put together rightly and holds no weight twice.

Faults planted one at a time, each of which turned a test red: no 1 in Gemma's norms, its logits
not soft-capped; Granite's embedding or logits not scaled; Phi-3 without its window; rotary in all
layers of SmolLM3; one table for both kinds of Gemma-3's layers; norms behind sublayers before them;
heads not normed; views not made; queries of other tokens noted; short edges not copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.engine import backend, decoder
from pipeline.engine.backend import Backend, choose_backend
from pipeline.engine.forward import PiecewiseForward, TransformersForward
from pipeline.engine.kernels import layer_rules, layer_steps, triton_kernel
from pipeline.engine.kernels.layer_rules import Joint
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.merged_linear import MergedLinear
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.packing import Packer, Piece, pack_prefill
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.triton_forward import TritonForward
from pipeline.engine.verify.self_test import (
    eviction_self_test,
    segment_self_test,
    self_test,
)
from pipeline.errors import EngineError
from pipeline.model.model import LoadedModel
from pipeline.plan.conversations import Eviction
from pipeline.plan.documents import Reuse
from pipeline.settings import EngineSettings
from tests.engine import families, test_observation, tiny
from tests.engine.families import FAMILIES, Family
from tests.engine.test_families import generate, random_plan, worst_difference

CPU = torch.device("cpu")
KNOWN = [family for family in FAMILIES if family.model_type in decoder.FAMILIES]
BY_ID = {family.id: family for family in FAMILIES}
every_known = pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.id)


@pytest.fixture(autouse=True)
def slow_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step by its reference."""
    for name in ("join", "rotate_and_store", "gate"):
        monkeypatch.setattr(layer_steps, name, getattr(layer_rules, f"{name}_reference"))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that choose their backend meanwhile run by `TritonForward`."""
    monkeypatch.setattr("pipeline.engine.prefix_engine.choose_backend", fused_backend)


def fused_backend(loaded: LoadedModel, kernels: str) -> Backend:
    return Backend(TritonForward(loaded.model), TorchKernel(CPU))


@every_known
@pytest.mark.usefixtures("fused")
def test_every_logit_of_a_family_equals_its_eager_attention(family: Family) -> None:
    assert worst_difference(families.load(family), random_plan(), "auto") < family.bound


@every_known
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=["bfloat16", "float16"],
)
def test_half_precision_passes_the_test_at_load(family: Family, dtype: torch.dtype) -> None:
    assert self_test(PrefixEngine(families.load(family, dtype), EngineSettings())) >= 0.0


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2, soft-capped scores, window in some layers", "after"),
        ("granite, multipliers", "multiplier"),
    ],
)
@pytest.mark.usefixtures("fused")
def test_a_joint_that_is_wrong_is_seen(
    family: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else equality above would say nothing about what these families join by."""
    plain: dict[str, Any] = {"after": None, "multiplier": 1.0}
    right = layer_rules.join_reference

    def wrong(x: Any, y: Any, joint: Joint, rows: Any = None) -> Any:
        return right(x, y, joint._replace(**{change: plain[change]}), rows)

    monkeypatch.setattr(layer_steps, "join", wrong)
    known = BY_ID[family]
    assert worst_difference(families.load(known), random_plan(), "auto") > 100 * known.bound


def test_logits_in_pieces_are_the_logits() -> None:
    forward = TritonForward(families.load(BY_ID["llama, grouped heads"]).model)
    assert isinstance(forward, PiecewiseForward)
    cache = KVCache((3, 2, 16), 20, like=torch.zeros(1))
    nothing = np.zeros(0, np.int64)
    pieces = [Piece(np.arange(9), 0, 3, 0, ())]
    batch = pack_prefill(pieces, (nothing, nothing), Packer(TorchKernel(CPU), CPU))
    keep = torch.tensor([8, 2, 5])
    with torch.inference_mode():
        whole, every = forward(batch, cache, keep), forward(batch, cache, torch.arange(9))
        parts = [*forward.in_pieces(batch, cache, keep, size=2)]
    assert [len(part) for part in parts] == [2, 1]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(every[keep], whole)


def test_merged_weights_are_held_once_and_layers_give_what_they_gave() -> None:
    loaded = families.load(BY_ID["qwen2, no window"])
    model = loaded.model
    held = bytes_held(model)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        first = TritonForward(model)
        second = TritonForward(model)
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert bytes_held(model) == held
    assert model_bytes(first) == model_bytes(second), "merging again would hold weights twice"
    attention: Any = model.model.layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == (
        attention.q_proj.weight.untyped_storage().data_ptr()
    )


def bytes_held(model: PreTrainedModel) -> int:
    """Of all memory that its parameters are part of, each once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def model_bytes(forward: TritonForward) -> list[int]:
    """Where the merged weights lie."""
    layers = forward._decoder.layers
    return [x.weight.data_ptr() for layer in layers for x in (layer.qkv, layer.gate_and_up)]


def test_layers_of_which_some_have_biases_merge() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(6, 5), nn.Linear(6, 3, bias=False)
    x = torch.randn(4, 6)
    expected = torch.cat([one(x), two(x)], 1)
    merged = MergedLinear(one, two)
    torch.testing.assert_close(merged(x), expected)
    torch.testing.assert_close(torch.cat([one(x), two(x)], 1), expected)
    assert MergedLinear(one, two).weight.data_ptr() == merged.weight.data_ptr()
    assert MergedLinear(two).weight.data_ptr() == two.weight.data_ptr()


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gpt2, learned positions", "'gpt2'"),
        ("mixtral, no window", "'mixtral'"),
        ("cohere, interleaved rotary", "'cohere'"),
    ],
)
def test_a_family_that_is_not_known_runs_as_before_and_says_so(
    family: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernel, "is_available", lambda device_type="cuda": True)
    chosen = choose_backend(families.load(BY_ID[family]), "auto")
    assert isinstance(chosen.forward, TransformersForward) and chosen.note is not None
    assert "own code" in chosen.note and says in chosen.note
    engine = PrefixEngine(families.load(BY_ID[family]), EngineSettings(), chosen)
    assert chosen.note in engine.notes


def test_known_models_with_other_layers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "is_available", lambda device_type="cuda": True)
    model = families.load(BY_ID["llama, grouped heads"]).model
    assert backend._gpu_forward(model)[1] is None
    layer: Any = model.model.layers[0]
    layer.mlp.act_fn = nn.Tanh()
    assert "activation" in str(decoder.why_unknown(model))
    layer.mlp.down_proj = nn.Identity()
    assert "linear layers" in str(decoder.why_unknown(model))


@pytest.mark.usefixtures("fused")
def test_kv_of_another_shape_than_promised_is_an_error() -> None:
    loaded = families.load(BY_ID["llama, grouped heads"])
    wrong = replace(loaded, shape=replace(loaded.shape, num_kv_heads=4))
    with pytest.raises(EngineError, match="layer 0 made .* but the model's config promised"):
        self_test(PrefixEngine(wrong, EngineSettings()))


@pytest.mark.usefixtures("fused")
def test_tokens_equal_the_naive_engine_on_the_same_weights() -> None:
    loaded, plan = families.load(BY_ID["qwen3, no window"]), random_plan(rows=6)
    ours = generate(PrefixEngine(loaded, EngineSettings()), plan)
    plain = generate(NaiveEngine(loaded), plan)
    assert {s: c.token_ids for s, c in ours.items()} == {s: c.token_ids for s, c in plain.items()}


VIEWED = ("llama, grouped heads", "smollm3, rotary in some layers", "olmo2, norms of Q and K",
          "gemma3_text, window in some layers, two rotaries")  # fmt: skip


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("family", VIEWED)
def test_documents_are_seen_where_they_stand(family: str) -> None:
    """By views, which the same step makes that turns the heads."""
    engine = PrefixEngine(families.load(BY_ID[family]), EngineSettings())
    assert segment_self_test(engine, Reuse("concat", tiny.VOCABULARY)) < 1e-4


@pytest.mark.usefixtures("fused")
def test_conversations_give_up_tokens_by_what_is_noted() -> None:
    engine = PrefixEngine(families.load(BY_ID["llama, grouped heads"]), EngineSettings())
    assert eviction_self_test(engine, Eviction("h2o")) < 1e-4


def test_queries_that_are_noted_are_those_of_the_models_own_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, tokens = BY_ID["qwen3, window in some layers"], [5, 23, 0]
    expected, _ = test_observation.observe(families.load(family), "torch", tokens)
    monkeypatch.setattr(test_observation, "choose_backend", fused_backend)
    noted, _ = test_observation.observe(families.load(family), "torch", tokens)
    for ours, plain in zip(noted.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-4)
        assert ours[1] == plain[1]
