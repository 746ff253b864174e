"""A transformers decoder, read once into plain records: what its layers compute, by which weights.

Llama and its relatives differ in little: whether norms stand before or behind sublayers, whether
heads are normed, how many of their numbers turn and by which table, and which activation gates. All
of that is read here, so that a forward over these records knows no family. Weights that meet the
same input are merged (`merged_linear.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.engine.attention import window_of
from pipeline.engine.kernels.layer_rules import (
    ACTIVATIONS,
    Activation,
    HeadNorms,
    Joint,
    Norm,
    Turn,
    activate,
)
from pipeline.engine.kernels.rules import AttentionRules
from pipeline.engine.memory import release_cached
from pipeline.engine.merged_linear import MergedLinear

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3",
    "phi3", "granite", "smollm3",
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONE_TABLE = ""  # of models that turn all their layers alike


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. `turned_by` names what `Decoder.turns` gives, None: its heads are not turned."""

    number: int
    qkv: MergedLinear
    head_norms: HeadNorms | None
    turned_by: str | None
    rules: AttentionRules
    output: MergedLinear
    to_mlp: Joint
    gate_and_up: MergedLinear
    activation: Activation
    down: MergedLinear
    to_next: Joint


class Decoder:
    """The layers, and what stands around them. Asks for a model of which `why_unknown` is None.

    `first`: the norm before the first layer, if any; `to_next` of each layer has the one before the
    next, and of the last layer the one before the output layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        body: Any = model.model
        config: Any = model.config
        self._body = body
        self._embedding_scale = float(getattr(body, "embedding_multiplier", 1.0))
        self._model: Any = model
        self._logits_scale = float(getattr(config, "logits_scaling", None) or 1.0)
        self._softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        read = _Reader(config)
        befores = [read.norm(layer, "input_layernorm") for layer in body.layers]
        self.first = befores[0]
        self.layers: list[DecoderLayer] = []
        for layer, before in zip(body.layers, [*befores[1:], read.norm(body, "norm")], strict=True):
            self.layers.append(read.layer(layer, before))
            release_cached(model.device)  # the layer's own weights, which the merged ones replace

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [1, N] -> [N, hidden]."""
        x: Tensor = self._body.embed_tokens(token_ids)[0]
        return x if self._embedding_scale == 1.0 else x * self._embedding_scale

    def turns(self, x: Tensor, position_ids: Tensor) -> dict[str, Turn]:
        """By what heads at `position_ids` [1, N] are turned, by `turned_by`; x for its dtype."""
        rotary = self._body.rotary_emb
        names = getattr(rotary, "layer_types", None)
        if names is None:
            tables = {_ONE_TABLE: rotary(x, position_ids)}
        else:
            tables = {name: rotary(x, position_ids, name) for name in names}
        return {name: (cos[0], sin[0]) for name, (cos, sin) in tables.items()}

    def logits(self, states: Tensor) -> Tensor:
        """states [R, hidden], normed -> [R, V]."""
        logits: Tensor = self._model.lm_head(states)
        if self._logits_scale != 1.0:
            logits = logits / self._logits_scale
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits


def why_unknown(model: PreTrainedModel) -> str | None:
    """One clause that says what of this model is not known here, or None."""
    family = model.config.model_type
    if family not in FAMILIES:
        return f"they do not know the layers of a {family!r} model"
    if model.dtype not in _DTYPES:
        return f"they do not know {str(model.dtype).removeprefix('torch.')}"
    body: Any = model.model
    for layer in body.layers:
        if any(type(linear) is not nn.Linear for linear in _linears(layer)):
            return "its linear layers are not plain ones"
        if _activation(layer.mlp) is None:
            return "they do not know its activation"
    return None


class _Reader:
    """Reads layers of one model."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._adds_one = config.model_type.startswith("gemma")

    def norm(self, parent: Any, name: str) -> Norm | None:
        """The norm of that name; None where there is none."""
        module = getattr(parent, name, None)
        if module is None:
            return None
        weight = module.weight.data.float()
        eps = getattr(module, "variance_epsilon", None)
        return Norm(weight + 1.0 if self._adds_one else weight, module.eps if eps is None else eps)

    def layer(self, layer: Any, before_next: Norm | None) -> DecoderLayer:
        attention, mlp = layer.self_attn, layer.mlp
        multiplier = float(getattr(layer, "residual_multiplier", 1.0))
        after_attention, before_mlp = self._around_mlp(layer)
        activation = _activation(mlp)
        assert activation is not None, "asked for a model that is not known"
        return DecoderLayer(
            number=int(attention.layer_idx),
            qkv=MergedLinear(*_inputs_of(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")),
            head_norms=self._head_norms(attention),
            turned_by=self._turned_by(attention),
            rules=AttentionRules(
                attention.scaling,
                window=window_of(attention),
                softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
            ),
            output=MergedLinear(attention.o_proj),
            to_mlp=Joint(before_mlp, after_attention, multiplier),
            gate_and_up=MergedLinear(*_inputs_of(mlp, "gate_up_proj", "gate_proj", "up_proj")),
            activation=activation,
            down=MergedLinear(mlp.down_proj),
            to_next=Joint(before_next, self.norm(layer, "post_feedforward_layernorm"), multiplier),
        )

    def _around_mlp(self, layer: Any) -> tuple[Norm | None, Norm | None]:
        """Norms of what attention gives, and before the MLP. `post_attention_layernorm` is the
        first where norms stand behind sublayers (OLMo-2, Gemma-2), else the second."""
        named = self.norm(layer, "post_attention_layernorm")
        if hasattr(layer, "post_feedforward_layernorm"):
            return named, self.norm(layer, "pre_feedforward_layernorm")
        return None, named

    def _head_norms(self, attention: Any) -> HeadNorms | None:
        query, key = self.norm(attention, "q_norm"), self.norm(attention, "k_norm")
        if query is None or key is None:
            return None
        assert query.eps == key.eps, "one program norms both"
        size = int(attention.head_dim)
        parts = [norm.weight.view(-1, size) for norm in (query, key)]
        return HeadNorms(torch.cat(parts), query.eps)

    def _turned_by(self, attention: Any) -> str | None:
        if not getattr(attention, "use_rope", True):  # SmolLM3
            return None
        rotary_by_type = self._config.model_type in ("gemma3_text", "olmo3")
        return self._config.layer_types[attention.layer_idx] if rotary_by_type else _ONE_TABLE


def _inputs_of(parent: Any, whole: str, *parts: str) -> list[nn.Linear]:
    """The layers that take the same input; Phi-3 has them as one."""
    names = (whole,) if hasattr(parent, whole) else parts
    return [getattr(parent, name) for name in names]


def _linears(layer: Any) -> Iterator[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    yield from _inputs_of(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")
    yield from _inputs_of(mlp, "gate_up_proj", "gate_proj", "up_proj")
    yield from (attention.o_proj, mlp.down_proj)


@torch.inference_mode()
def _activation(mlp: Any) -> Activation | None:
    """The one that gives the same numbers: names of modules change."""
    module = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    x = torch.linspace(-6.0, 6.0, 25)
    if module is None:
        return None
    given = cast(Tensor, module(x))
    same = (name for name in ACTIVATIONS if torch.allclose(given, activate(x, name), 1e-5, 1e-6))
    return next(same, None)
