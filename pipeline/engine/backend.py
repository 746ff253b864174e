"""Which kernels and which forward a model runs by on this machine: the fastest that suits both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine import native_forward
from pipeline.engine.decoder import why_unknown
from pipeline.engine.forward import Forward, TransformersForward
from pipeline.engine.kernels import native, native_kernel, triton_kernel
from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.native_kernel import NativeKernel
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.native_forward import NativeForward
from pipeline.engine.sampling import Sampled, likeliest_token
from pipeline.engine.threads import pooled
from pipeline.engine.triton_forward import TritonForward
from pipeline.model.model import LoadedModel

_NATIVE_DTYPES = (torch.bfloat16, torch.float32)
_NATIVE_HEAD = 16  # the head size must be a multiple of it


@dataclass(frozen=True)
class Backend:
    """How a packed batch is computed; `note` tells a person where it is not the fastest way.

    `tile_sizes`: numbers of tokens to prove in strict mode; where its GEMMs take few, these.
    `recordable`: the kernel, where decode steps of it can be recorded and replayed. `is_pooled`: it
    runs on threads that wait for none that is put aside (`threads.pooled`).
    """

    forward: Forward
    kernel: AttentionKernel
    note: str | None = None
    likeliest: Callable[[Tensor], Sampled] = likeliest_token
    tile_sizes: tuple[int, ...] = ()
    recordable: TritonKernel | None = None
    is_pooled: bool = False


def choose_backend(loaded: LoadedModel, kernels: str) -> Backend:
    """`kernels`: "auto" is the fastest way; "torch" nothing private and nothing compiled."""
    model, shape, device = loaded.model, loaded.shape, loaded.device
    heads = model.config.num_attention_heads, shape.num_kv_heads
    if kernels == "auto" and triton_kernel.is_available(device.type):
        on_gpu = TritonKernel(*heads, device)
        forward, note = _gpu_forward(model)
        return Backend(forward, on_gpu, note, recordable=on_gpu)
    if kernels == "torch" or device.type != "cpu":
        return Backend(TransformersForward(model, pack_weights=False), TorchKernel(device))
    reason = native.why_unavailable()
    if reason is None and not knows_heads(loaded):
        reason = f"they do not know {model.dtype} with heads of {shape.head_dim}"
    if reason:
        note = f"attention runs on plain torch, not on coppice's CPU kernels: {reason}"
        packed = TransformersForward(model, pack_weights=True)
        return Backend(packed, TorchKernel(device), note)
    forward = fused_forward(model)
    kernel, likeliest = NativeKernel(*heads), native_kernel.likeliest_token
    if is_pooled(forward):
        return Backend(forward, kernel, likeliest=pooled()(likeliest), is_pooled=True)
    return Backend(forward, kernel, likeliest=likeliest)


def _gpu_forward(model: PreTrainedModel) -> tuple[Forward, str | None]:
    """With fused Triton programs where they know the model, else its own code and a note."""
    reason = why_unknown(model)
    if reason is None:
        return TritonForward(model), None
    note = f"layers are computed by the model's own code, not by coppice's GPU programs: {reason}"
    return TransformersForward(model, pack_weights=False), note


def fused_forward(model: PreTrainedModel) -> Forward:
    """With the compiled kernels' fused steps, where they know the model; packed weights anyway."""
    if native_forward.suits(model):
        return NativeForward(model)
    return TransformersForward(model, pack_weights=True)


def is_pooled(forward: Forward) -> bool:
    """Whether all products are our own kernels', which run on a pool and add in one order."""
    return isinstance(forward, NativeForward) and forward.is_pooled


def knows_heads(loaded: LoadedModel) -> bool:
    """Whether the compiled kernels know the type and size of this model's heads."""
    return loaded.model.dtype in _NATIVE_DTYPES and not loaded.shape.head_dim % _NATIVE_HEAD
