"""Strict mode's backend: products in tiles of known sizes, attention in one order of roundings.

Whether that makes a model's bits independent of what runs beside it is shown by `strict_probe`.
"""

from __future__ import annotations

import torch

from pipeline.engine import native_forward
from pipeline.engine.backend import Backend, knows_heads
from pipeline.engine.forward import Forward, TransformersForward, can_pack
from pipeline.engine.kernels import native, native_kernel
from pipeline.engine.kernels.kernel import AttentionKernel
from pipeline.engine.kernels.strict_native_kernel import StrictNativeKernel
from pipeline.engine.kernels.strict_torch_kernel import StrictTorchKernel
from pipeline.engine.model import LoadedModel
from pipeline.engine.sampling import likeliest_token
from pipeline.engine.support import has_experts
from pipeline.engine.tiled_forward import ONE_SIZE, SIZES, TiledForward
from pipeline.errors import UsageError


def choose_strict_backend(loaded: LoadedModel, kernels: str) -> Backend:
    """`kernels` as in `choose_backend`. Raises UsageError for what strict mode does not know."""
    reason = why_not_strict(loaded)
    if reason:
        raise UsageError(f"--fidelity strict: {reason}")
    kernel: AttentionKernel = StrictTorchKernel()
    if kernels == "torch":
        return Backend(_tiled(loaded, pack=False), kernel)
    reason = native.why_unavailable()
    if reason is None and knows_heads(loaded):
        kernel = StrictNativeKernel()
        return Backend(_tiled(loaded, pack=True), kernel, None, native_kernel.likeliest_token)
    note = f"strict attention runs query by query in plain torch: {reason or 'unusual heads'}"
    return Backend(_tiled(loaded, pack=True), kernel, note, likeliest_token)


def why_not_strict(loaded: LoadedModel) -> str | None:
    """One clause that names what strict mode does not cover, or None."""
    if loaded.device.type != "cpu":
        return f"it was never verified on {loaded.device.type}; choose --device cpu"
    if loaded.model.dtype != torch.float32:
        name = str(loaded.model.dtype).removeprefix("torch.")
        return f"it is defined for float32 only, not for {name}; choose --dtype float32"
    if has_experts(loaded.model.config):
        return (
            "an expert computes as many tokens at once as a router sends it, so a row's products "
            "depend on its neighbours; leave it out for this model"
        )
    return None


def _tiled(loaded: LoadedModel, *, pack: bool) -> TiledForward:
    """Packed products keep their bits in all `SIZES` on the machines that we saw; others do not."""
    model = loaded.model
    if not pack or not can_pack(model):
        return TiledForward(TransformersForward(model, pack_weights=False), ONE_SIZE)
    forward: Forward
    if native.why_unavailable() is None and native_forward.suits(model):
        forward = native_forward.NativeForward(model)
    else:
        forward = TransformersForward(model, pack_weights=True)
    return TiledForward(forward, SIZES)
