"""A Hugging Face decoder, loaded safely: safetensors only, no code from the repository is run.

Knows the model's files and shape. Knows nothing about prompts, plans or attention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from pipeline.engine.support import why_unsupported
from pipeline.errors import ModelError
from pipeline.generation import UnsupportedGeneration, resolve_sampling
from pipeline.settings import ModelSettings, SamplingSettings

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEFAULTS: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "max_new_tokens": (int,),
}
_SHOWN_CHARACTERS = 200  # of what transformers says
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs to know of a model; read from its config alone."""

    family: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    context_length: int | None
    vocabulary_size: int
    dtype: str
    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]

    def kv_bytes_per_token(self, dtype: str = "auto") -> int:
        """Bytes of K and V of one token over all layers, in `dtype` (auto: as the model is)."""
        size = _BYTES[self.dtype if dtype == "auto" else dtype]
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * size


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device. `source` says where it came from."""

    model: PreTrainedModel
    shape: ModelShape
    source: str

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return torch.device(self.model.device)


def read_shape(model: str, revision: str | None = None) -> ModelShape:
    """Read the config of a folder or hub id, no weights. Raises ModelError."""
    config = _read_config(model, revision)
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    heads = getattr(layers[0], "num_attention_heads", None)
    if not heads or not getattr(config, "vocab_size", None):
        raise ModelError(
            f"{model}: a {config.model_type!r} model is no plain decoder; "
            "name a causal language model such as a Llama, Qwen2, Mistral or GPT-2"
        )
    generation, eos = _read_generation(model, revision, config)
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return ModelShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_kv_heads=max(getattr(c, "num_key_value_heads", None) or heads for c in layers),
        head_dim=max(getattr(c, "head_dim", None) or c.hidden_size // heads for c in layers),
        context_length=getattr(config, "max_position_embeddings", None),
        vocabulary_size=config.vocab_size,
        dtype=dtype if dtype in _BYTES else "float32",
        generation_config=generation,
        eos_token_ids=eos,
    )


def read_rope(model: str, revision: str | None = None) -> dict[str, Any]:
    """How positions enter the keys, as plain values of the config. Raises ModelError."""
    config = _read_config(model, revision).to_dict()
    names = sorted(name for name in config if "rope" in name or "rotary" in name)
    return {name: config[name] for name in names}


def _read_generation(
    model: str, revision: str | None, config: Any
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Generation defaults, and the tokens that end an answer. Raises ModelError."""
    has_file = (Path(model) / "generation_config.json").exists()
    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision)
    except Exception as error:  # of every kind, for values of wrong types
        if has_file or not isinstance(error, OSError):  # its stop tokens must not be lost
            raise ModelError(
                f"{model}: generation_config.json cannot be read; download it again or remove it"
            ) from error
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    defaults: dict[str, Any] = generation.to_diff_dict()
    reason = _why_no_defaults(defaults)
    if not all(type(token_id) is int and token_id >= 0 for token_id in eos):
        reason = "eos_token_id is not a token id or a list of them"
    if reason:
        raise ModelError(f"{model}: generation_config.json: {reason}; correct or remove it")
    return defaults, tuple(eos)


def _why_no_defaults(defaults: dict[str, Any]) -> str | None:
    """Why no row could be generated with these, or None."""
    for name, wanted in _DEFAULTS.items():
        value = defaults.get(name)
        if value is not None and type(value) not in wanted:
            return f"{name} is of type {type(value).__name__}"
    try:
        resolve_sampling(SamplingSettings(), defaults, {})
    except UnsupportedGeneration:
        return None  # a flag can say otherwise, see `job/planning.py`
    except ValueError as error:
        return str(error)
    return None


def load_model(settings: ModelSettings) -> LoadedModel:
    """Load weights onto the device.

    Raises ModelError: missing, partial, or pickle-only weights, or a family the engine cannot run.
    """
    shape = read_shape(settings.model, settings.revision)
    check_weights(settings.model)
    _check_support(settings)
    dtype = shape.dtype if settings.dtype == "auto" else settings.dtype
    config = _read_config(settings.model, settings.revision)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would warn of is an error here, said once
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=own_attention(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config),
            output_loading_info=True,
        )
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
    return LoadedModel(model.to(choose_device(settings.device)), shape, settings.model)


def own_attention(model_class: Any, config: Any) -> str:
    """transformers' fused attention; its plain one for the models that have no other.

    transformers 5.19 offers the fused one to Gemma 2 as well, and leaves the soft cap out there.
    """
    has_cap = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not has_cap else "eager"


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU. Raises ModelError for an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used: {reason}") from None
    return chosen


def name_device(device: str) -> str:
    """What the chosen device is called on this machine, whatever numbers a process sees it by.

    Raises ModelError for an absent one.
    """
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen.type
    return f"cuda {torch.cuda.get_device_properties(chosen).uuid}"


def _check_support(settings: ModelSettings) -> None:
    """Say what the prefix engine lacks before transformers fails on what it lacks itself."""
    if settings.engine != "prefix":
        return
    reason = why_unsupported(_read_config(settings.model, settings.revision))
    if reason:
        raise ModelError(f"{settings.model}: {reason}")


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


def _read_config(model: str, revision: str | None) -> Any:
    looks_local = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise ModelError(f"{model}: no such model folder; give a folder or a hub id like org/name")
    if looks_local and not (Path(model) / "config.json").is_file():
        raise ModelError(f"{model}: no config.json in this folder, so it is not a model")
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # a missing repository, bad JSON, an unknown type, remote code
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model}: the model's config cannot be read: {reason}") from error
