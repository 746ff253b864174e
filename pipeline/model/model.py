"""A Hugging Face decoder, loaded safely: safetensors only, no code from the repository is run.

Knows nothing about prompts, plans or attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import ModelError
from pipeline.model.device import choose_device
from pipeline.model.families import why_unsupported
from pipeline.model.int8 import hold_in_int8
from pipeline.model.quantized import PlainWeights, read_plain
from pipeline.model.shape import ModelShape, read_config, read_shape
from pipeline.model.weights import check_int8, check_weights, is_readable, quantization_of
from pipeline.settings import ModelSettings

_SHOWN_CHARACTERS = 200  # of what transformers says


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device. `source` says where it came from.

    `notes`: what was made of it that its user should know.
    """

    model: PreTrainedModel
    shape: ModelShape
    source: str
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def load_model(settings: ModelSettings) -> LoadedModel:
    """Load weights onto the device. Raises ModelError where they are missing, partial or pickled,
    or of a family that the engine cannot run."""
    shape = read_shape(settings.model, settings.revision)
    check_weights(settings.model)
    check_int8(settings)
    config = read_config(settings.model, settings.revision)
    # What the prefix engine lacks is said before transformers fails on what it lacks itself.
    reason = why_unsupported(config) if settings.engine == "prefix" else None
    if reason:
        raise ModelError(f"{settings.model}: {reason}")
    dtype = getattr(torch, shape.dtype if settings.dtype == "auto" else settings.dtype)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would warn of is an error here, said once
    saved, notes = PlainWeights(), []
    try:
        if is_readable(config):
            saved = read_plain(_folder_of(settings), config, dtype)
            notes = [_say_unpacked(config, settings, bool(saved.int8))]
            del config.quantization_config
        model, report = _from_pretrained(settings, config, dtype, saved.tensors or None)
    except Exception as error:  # transformers raises a dozen kinds; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0][:_SHOWN_CHARACTERS]
        raise ModelError(
            f"{settings.model}: the weights cannot be loaded ({reason}); "
            "check that the download is complete"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{settings.model}: {len(missing)} weights are missing, {missing[0]!r} among them; "
            "the download is partial or belongs to another architecture"
        )
    model.eval().requires_grad_(False)
    if settings.weights == "int8":
        hold_in_int8(model, saved.int8)
    device = choose_device(settings.device)
    return LoadedModel(model.to(device), shape, settings.model, tuple(notes))


def _from_pretrained(
    settings: ModelSettings, config: Any, dtype: torch.dtype, tensors: dict[str, Tensor] | None
) -> tuple[Any, dict[str, Any]]:
    """The model and what was found of its weights: in its files, or `tensors` instead of them."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    load = (model_class if tensors else AutoModelForCausalLM).from_pretrained
    loaded: tuple[Any, dict[str, Any]] = load(
        None if tensors else settings.model,
        config=config,
        state_dict=tensors,
        revision=settings.revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=own_attention(model_class, config),
        output_loading_info=True,
    )
    return loaded


def _folder_of(settings: ModelSettings) -> Path:
    """Where the files of the model lie; those of a hub id are fetched unless they were."""
    if Path(settings.model).is_dir():
        return Path(settings.model)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    return Path(
        snapshot_download(settings.model, revision=settings.revision, allow_patterns=patterns)
    )


def _say_unpacked(config: Any, settings: ModelSettings, has_int8: bool) -> str:
    """What was made of rounded weights, which a run says at its start."""
    said = f"the weights were saved by {quantization_of(config)['quant_method']}"
    if settings.weights == "int8":
        how = "are used as they are" if has_int8 else "were unpacked and rounded to int8"
        return f"{said} and {how}"
    faster = "; --weights int8 takes them as they are, faster" if has_int8 else ""
    return f"{said} and were unpacked{faster}"


def own_attention(model_class: Any, config: Any) -> str:
    """transformers' fused attention; its plain one for the models that have no other.

    transformers 5.19 offers the fused one to Gemma 2 as well, and leaves the soft cap out there.
    """
    has_cap = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not has_cap else "eager"
