"""Whether a model's weights may be loaded: safetensors, complete, within the folder; as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, UsageError
from pipeline.model.families import has_experts
from pipeline.model.shape import read_config
from pipeline.settings import ModelSettings

READABLE_BITS = (4, 8)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_weights(model: str) -> None:
    """Refuse a local folder whose weights are absent, incomplete or pickled. Raises ModelError."""
    folder = Path(model)
    if not folder.is_dir():
        return
    present = {p.name for p in folder.iterdir()}
    if not present.intersection(_WEIGHTS):
        pickled = sorted(n for n in present if n.endswith((".bin", ".pt", ".pth", ".pkl")))
        if pickled:
            raise ModelError(
                f"{model}: only pickled weights ({pickled[0]}), which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise ModelError(f"{model}: no model.safetensors in this folder; is the download complete?")
    if _WEIGHTS[1] in present:
        _check_index(model, folder / _WEIGHTS[1], present)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checked folder's weights."""
    index = folder / _WEIGHTS[1]
    if not index.exists():
        return [_WEIGHTS[0]]
    return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))


def quantization_of(config: Any) -> dict[str, Any]:
    """What the config says of how the checkpoint was rounded; empty where it was not."""
    return getattr(config, "quantization_config", None) or {}


def is_readable(config: Any) -> bool:
    """Whether `quantized.py` knows the checkpoint's layout; others are transformers' to load."""
    said = quantization_of(config)
    match said.get("quant_method"):
        case "compressed-tensors":
            has_rotations = said.get("transform_config")  # of inputs, which nobody would do
            return said.get("format") in ("int-quantized", "pack-quantized") and not has_rotations
        case "gptq":
            is_known = said.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
            return is_known and said.get("bits") in READABLE_BITS
        case "awq":
            return said.get("bits") == 4 and str(said.get("version", "gemm")).lower() == "gemm"
    return False


def check_int8(settings: ModelSettings) -> None:
    """Refuse int8 weights where there are none. Raises ModelError, UsageError."""
    if settings.weights != "int8":
        return
    config = read_config(settings.model, settings.revision)
    if quantization_of(config) and not is_readable(config):
        method = quantization_of(config).get("quant_method")
        raise ModelError(
            f"{settings.model}: the weights were saved by {method!r} in a layout that "
            "--weights int8 cannot read; leave it out, or name the model as it was before"
        )
    if has_experts(config):
        raise ModelError(
            f"{settings.model}: --weights int8 knows linear layers alone, and most weights of this "
            "model lie in its experts; leave it out"
        )
    from pipeline.model.device import choose_device

    device = choose_device(settings.device)
    if device.type != "cpu":
        raise UsageError(
            f"--weights int8 is for CPUs, and this job would run on {device.type}; "
            "choose --device cpu, or leave it out"
        )


def _check_index(model: str, index: Path, present: set[str]) -> None:
    """What the index names is opened as it says: by torch's unpickler, or outside of the folder."""
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{model}: {index.name} cannot be read; download it again") from error
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ModelError(f"{model}: {index.name} names a file outside of the folder, {name!r}")
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{model}: {index.name} names {name!r}, which is not safetensors; convert it"
            )
    absent = sorted(named - present)
    if absent:
        raise ModelError(
            f"{model}: {len(absent)} of the weight files are missing, {absent[0]} first; "
            "finish the download"
        )
