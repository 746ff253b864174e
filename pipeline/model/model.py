"""A Hugging Face decoder, loaded safely: safetensors only, no code from the repository is run.

Knows nothing about prompts, plans or attention.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
_LOADING = threading.Lock()


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
    method, saved = quantization_of(config).get("quant_method"), None
    try:
        if is_readable(config):
            saved = read_plain(_folder_of(settings), config, dtype)
            del config.quantization_config
        model, report = _from_pretrained(settings, config, dtype, saved)
        if saved is not None:
            _check_biases(report["unexpected_keys"], saved)
            saved.tensors.clear()  # the model has them, or its own
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
    int8 = {} if saved is None else saved.int8
    rounded = hold_in_int8(model, int8) if settings.weights == "int8" else []
    notes = () if saved is None else (_say_unpacked(str(method), rounded, int8.keys()),)
    return LoadedModel(model.to(choose_device(settings.device)), shape, settings.model, notes)


def _check_biases(unexpected: Iterable[str], saved: PlainWeights) -> None:
    """Some packers add a bias of zeros to every layer; one that says something must not be lost."""
    for name in unexpected:
        if name.endswith(".bias") and saved.tensors[name].any():
            raise ValueError(f"the model has no place for {name}")


def _from_pretrained(
    settings: ModelSettings, config: Any, dtype: torch.dtype, saved: PlainWeights | None
) -> tuple[Any, dict[str, Any]]:
    """The model and what was found of its weights: in its files, or in `saved` instead of them.

    One at a time: transformers turns tying off for the whole process while it loads, and two
    threads that do so can leave it off, after which no model with tied weights is whole.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    load = (model_class if saved else AutoModelForCausalLM).from_pretrained
    with _LOADING:
        loaded: tuple[Any, dict[str, Any]] = load(
            None if saved else settings.model,
            config=config,
            state_dict=saved and saved.tensors,
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


def _say_unpacked(method: str, rounded: Sequence[str], saved: Collection[str]) -> str:
    """What was made of a rounded checkpoint, which a run says at its start.

    `rounded`: layers that are held in int8 now; `saved`: those that were saved so.
    """
    said = f"the weights were saved by {method}"
    if not rounded:
        faster = "; --weights int8 takes them as they are, faster" if saved else ""
        return f"{said} and were unpacked{faster}"
    as_saved = sum(name in saved for name in rounded)
    return (
        f"{said}: {as_saved} of {len(rounded)} layers are used as they are in int8, and "
        f"{len(rounded) - as_saved} were rounded to it"
    )


def use_own_attention(model: PreTrainedModel) -> None:
    """The model object may have served an engine of ours before."""
    own = own_attention(type(model), model.config)
    if model.config._attn_implementation != own:
        model.set_attn_implementation(own)


def own_attention(model_class: Any, config: Any) -> str:
    """transformers' fused attention; its plain one for the models that have no other.

    transformers 5.19 offers the fused one to Gemma 2 as well, and leaves the soft cap out there.
    """
    has_cap = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not has_cap else "eager"
