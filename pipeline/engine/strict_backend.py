"""Strict mode's backend: GEMMs and attention in one order of roundings, or GEMMs in known sizes.

Whether that makes a model's bits independent of what runs beside it is shown by `strict_probe`.
"""

from __future__ import annotations

import torch

from pipeline.engine.backend import Backend, fused_forward, is_pooled, knows_heads
from pipeline.engine.forward import Forward, TransformersForward, can_pack
from pipeline.engine.kernels import native, native_kernel
from pipeline.engine.kernels.strict_native_kernel import StrictNativeKernel
from pipeline.engine.kernels.strict_torch_kernel import StrictTorchKernel
from pipeline.engine.threads import pooled
from pipeline.engine.tiled_forward import ONE_SIZE, SIZES, TiledForward
from pipeline.errors import UsageError
from pipeline.model.families import has_experts
from pipeline.model.model import LoadedModel


def choose_strict_backend(loaded: LoadedModel, kernels: str) -> Backend:
    """`kernels` as in `choose_backend`. Raises UsageError for what strict mode does not know."""
    reason = why_not_strict(loaded)
    if reason:
        raise UsageError(f"--fidelity strict: {reason}")
    forward, sizes = _tiled(loaded, pack=kernels != "torch")
    if kernels == "torch":
        return Backend(forward, StrictTorchKernel(), tile_sizes=sizes)
    reason = native.why_unavailable() or (None if knows_heads(loaded) else "unusual heads")
    if reason:
        note = f"strict attention runs query by query in plain torch: {reason}"
        return Backend(forward, StrictTorchKernel(), note, tile_sizes=sizes)
    kernel, likeliest = StrictNativeKernel(), native_kernel.likeliest_token
    if is_pooled(forward):
        return Backend(forward, kernel, None, pooled()(likeliest), sizes, is_pooled=True)
    return Backend(forward, kernel, None, likeliest, sizes)


def why_not_strict(loaded: LoadedModel) -> str | None:
    """One clause that names what strict mode does not cover, or None."""
    if loaded.device.type != "cpu":
        return f"it was never verified on {loaded.device.type}; choose --device cpu"
    if loaded.model.dtype != torch.float32:
        name = str(loaded.model.dtype).removeprefix("torch.")
        return f"it is defined for float32 only, not for {name}; choose --dtype float32"
    if has_experts(loaded.model.config):
        return (
            "an expert computes as many tokens at once as a router sends it, so a row's GEMMs "
            "depend on its neighbours; leave it out for this model"
        )
    return None


def _tiled(loaded: LoadedModel, *, pack: bool) -> tuple[Forward, tuple[int, ...]]:
    """A forward and the sizes of its tiles.

    Packed GEMMs keep their bits in all `SIZES` on the machines that we saw; others do not. Our own
    add in one order (`kernels/gemm.h`), or whole numbers: they need no tiles.
    """
    model = loaded.model
    if not pack or not can_pack(model):
        return TiledForward(TransformersForward(model, pack_weights=False), ONE_SIZE), ONE_SIZE
    if native.why_unavailable() is not None:
        return TiledForward(TransformersForward(model, pack_weights=True), SIZES), SIZES
    forward = fused_forward(model)
    return (forward if is_pooled(forward) else TiledForward(forward, SIZES)), SIZES
