"""One packed batch through the model: the interface, and the way that suits every family.

`TransformersForward` runs the model's own code with our attention in it. `native_forward` runs the
families it knows layer by layer with fused kernels. The engine cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.engine import blocked_linear, packed_linear
from pipeline.engine.attention import ATTENTION_NAME
from pipeline.engine.blocked_linear import BlockedLinear
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.memory import free_memory
from pipeline.engine.packed_linear import PackedLinear
from pipeline.engine.packing import PackedBatch
from pipeline.model.int8 import Int8Linear

_SHARE_FOR_PACKED_WEIGHTS = 0.25  # of free memory; above it the model's own weights are used


class Forward(Protocol):
    """Computes the logits of a packed batch, writing its KV into the cache."""

    name: str

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        """Logits [len(keep), V], in the model's dtype, of the packed positions `keep`."""


@runtime_checkable
class PiecewiseForward(Protocol):
    """One whose output layer is apart from the others."""

    def in_pieces(
        self, batch: PackedBatch, cache: KVCache, keep: Tensor, size: int
    ) -> Iterator[Tensor]:
        """The same logits, at most `size` positions at a time: all of them need never be there."""


class TransformersForward:
    """The model's own forward, with cascade attention and, on a CPU, packed weights."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, *, pack_weights: bool) -> None:
        self._model = model
        self._is_running = False
        if pack_weights and can_pack(model):
            for module in model.modules():
                if type(module) in (nn.Linear, Int8Linear) and blocked_linear.suits(module):
                    self._pack(module, BlockedLinear(module))
                elif type(module) is nn.Linear:
                    self._pack(module, PackedLinear.of(module))
                elif type(module) is Conv1D:  # GPT-2 keeps its weights as [in, out]
                    self._pack(module, PackedLinear(module.weight.T, module.bias))

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        if self._model.config._attn_implementation != ATTENTION_NAME:
            self._model.set_attn_implementation(ATTENTION_NAME)
            assert self._model.config._attn_implementation == ATTENTION_NAME, "switch was refused"
        self._is_running = True
        try:
            logits: Tensor = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=keep,
                packed_batch=batch,
                kv_cache=cache,
            ).logits[0]
        finally:
            self._is_running = False
        return logits

    def _pack(self, module: Any, packed: Callable[[Tensor], Tensor]) -> None:
        """Use packed weights in our forwards only: the audit's baseline stays the model's own."""
        plain = module.forward

        def forward(x: Tensor) -> Any:
            return packed(x) if self._is_running else plain(x)

        module.forward = forward


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a second, packed copy of the weights is possible and leaves memory for the job."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not packed_linear.is_available(weight.dtype):
        return False
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return bool(size <= free_memory(weight.device) * _SHARE_FOR_PACKED_WEIGHTS)
